"""The marginal velocity of the eight Gaussians, and both sides of the Wasserstein bound."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from tvm_ref.data.toys import DEVIATION, RADIUS, nearest_gaussian
from tvm_ref.model.config import DiTConfig
from tvm_ref.quality import transport_bound
from tvm_ref.quality.marginal_velocity import carried_to_data, marginal_velocity
from verify.oracles.network import trained

LEAST_P = 1e-9
CONFIG = DiTConfig(image_size=1, channels=2, patch=1, width=8, depth=1, heads=1, guidance=False)


@pytest.mark.parametrize("s", [0.3, 0.6, 0.9])
def test_the_marginal_velocity_is_the_mean_of_x1_minus_x0_given_x_s(s: float) -> None:
    """By quadrature over x0, which with x_s gives x1."""
    places = torch.tensor([[0.5, 0.2], [-1.0, 0.9], [0.0, -1.5]], dtype=torch.float64)
    grid = np.arange(-4, 4, 0.02)
    x0 = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    angle = np.arange(8) * np.pi / 4
    centres = RADIUS * np.stack([np.cos(angle), np.sin(angle)], 1)
    density = sum(np.exp(-((x0 - centre) ** 2).sum(1) / (2 * DEVIATION**2)) for centre in centres)
    for place in places:
        x1 = (place.numpy() - (1 - s) * x0) / s
        weight = density * np.exp(-(x1**2).sum(1) / 2)
        expected = (weight[:, None] * (x1 - x0)).sum(0) / weight.sum()
        # Sums of smooth functions that vanish at the ends of the grid are exact but for rounding.
        assert marginal_velocity(place[None], s)[0].tolist() == pytest.approx(expected.tolist())


def test_it_carries_noise_to_the_eight_gaussians() -> None:
    noise = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = carried_to_data(noise, 200)
    assert len(places) == 201 and torch.equal(places[0], noise)
    nearest = nearest_gaussian(places[-1])
    assert scipy.stats.chisquare(np.bincount(nearest, minlength=8)).pvalue > LEAST_P
    angle = nearest.double() * (math.pi / 4)
    offset = places[-1] - RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    assert scipy.stats.kstest((offset / DEVIATION).flatten().numpy(), "norm").pvalue > LEAST_P


def test_integrals_with_an_exponential_factor() -> None:
    times = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for rate in (0.5, 3.0):
        found = transport_bound._log_integral(torch.full_like(times, rate), torch.ones_like(times), times)
        assert 10**found == pytest.approx((math.exp(rate) - 1) / rate, rel=1 / len(times))
    huge = transport_bound._log_integral(torch.full_like(times, 1e3), torch.ones_like(times), times)
    assert huge == pytest.approx(1e3 / math.log(10) - 3, rel=1 / len(times))


def test_the_bounds_are_above_what_they_bound() -> None:
    """Of any network; the constants of Lipschitz are estimates, so some slack would be allowed, but none is needed."""
    found = transport_bound.bound(trained(CONFIG, 0).float(), 64, 0)
    assert all(map(math.isfinite, found))
    endpoint = math.log10(found.endpoint)
    assert endpoint < found.log10_one_sided <= found.log10_linear
    assert endpoint < found.log10_groenwall
    assert found.lipschitz > 0 and found.integral > 0
