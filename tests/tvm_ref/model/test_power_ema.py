"""Averages for post-hoc EMA: what is tracked is what the profile says, and others are made of it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tvm_ref.model import ema
from tvm_ref.model.power_ema import WIDEST, PowerAverage, Profile, combine, gamma_of, sigma_rel_of

TRACKED = (0.05, 0.1)


def weights_of_steps(profile: Profile, steps: int) -> np.ndarray:
    """The profile's weight of each step 1..steps: its integral from i - 1 to i."""
    ends = np.minimum(np.arange(steps + 1), profile.step) / profile.step
    return np.diff(ends ** (profile.gamma + 1))


def length(profile: Profile) -> float:
    """The root of the integral of the squared profile."""
    return (profile.gamma + 1) / math.sqrt((2 * profile.gamma + 1) * profile.step)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.28])
def test_the_relative_width_is_the_deviation_of_the_profile(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert math.isclose(sigma_rel_of(gamma), sigma_rel)
    places = (np.arange(10**6) + 0.5) / 10**6
    density = weights_of_steps(Profile(10**6, gamma), 10**6)
    mean = density @ places
    assert math.isclose(density.sum(), 1)
    assert math.isclose(math.sqrt(density @ (places - mean) ** 2), sigma_rel, rel_tol=10 / 10**6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 1e-300, WIDEST, 1.0, math.nan, math.inf])
def test_a_width_that_no_profile_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel: expected a number from 1e-06 to less than 0\.2887, got"):
        gamma_of(sigma_rel)


def test_the_updates_give_the_weights_of_the_profile() -> None:
    network = nn.Linear(3, 2, dtype=torch.float64)
    average = ema.copy_of(network)
    update = PowerAverage(average, network, 0.1)
    past = []
    for step in range(1, 41):
        with torch.no_grad():
            network.weight.normal_()
        update.update(step)
        past.append(network.weight.detach().clone())
    weights = weights_of_steps(Profile(40, gamma_of(0.1)), 40)
    expected = sum(weight * value for weight, value in zip(weights.tolist(), past, strict=True))
    torch.testing.assert_close(average.weight, expected)
    torch.testing.assert_close(average.bias, network.bias.detach())


@pytest.mark.parametrize("wanted", [0.03, 0.05, 0.08, 0.1, 0.15, 0.2])
def test_other_averages_are_combined_within_the_error_that_is_stated(wanted: float) -> None:
    """By Cauchy and Schwarz, in float64: the weights of the steps are at most as far apart as the profiles."""
    steps, every = 1000, 25
    stored = [Profile(step, gamma_of(width)) for step in range(every, steps + 1, every) for width in TRACKED]
    goal = Profile(steps, gamma_of(wanted))
    how = combine(stored, goal)
    made = sum(x * weights_of_steps(one, steps) for x, one in zip(how.factors.tolist(), stored, strict=True))
    difference = np.linalg.norm(made - weights_of_steps(goal, steps))
    assert difference <= (how.error + math.sqrt(np.finfo(float).eps)) * length(goal)
    assert how.error < 0.02
    assert how.amplification >= 1 - how.error


def test_more_snapshots_make_it_more_exact() -> None:
    def error(every: int) -> float:
        stored = [Profile(step, gamma_of(width)) for step in range(every, 961, every) for width in TRACKED]
        return combine(stored, Profile(960, gamma_of(0.15))).error

    assert error(320) > error(80) > error(20)


def test_a_stored_average_is_itself() -> None:
    stored = [Profile(step, gamma_of(width)) for step in (10, 20, 30) for width in TRACKED]
    factors = combine(stored, stored[3]).factors
    assert np.abs(factors - np.eye(6)[3]).max() < math.sqrt(np.finfo(float).eps)
