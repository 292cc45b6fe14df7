"""Squares: sets of four points."""

import numpy as np
import pytest
import scipy.stats
import torch

from tvm_ref.data.dataset import DataConfig, open_dataset
from tvm_ref.data.point_sets import CENTRE, NOISE, RADII, as_images, as_sets, misfit, squares

LEAST_P = 1e-9
SETS = 4000


def test_squares_have_the_distribution_that_is_stated() -> None:
    corners = squares(SETS, 3).astype(np.float64)
    assert corners.shape == (SETS, 4, 2)
    centre = corners.mean(1)
    spread = np.hypot(CENTRE, NOISE / 2)  # of a mean of four corners
    assert scipy.stats.kstest(centre.ravel() / spread, "norm").pvalue > LEAST_P
    arms = (corners - centre[:, None]) @ [1, 1j]
    turned = (arms * 1j ** -np.arange(4)).mean(1)  # r exp(i a), with a quarter of the noise's variance
    assert scipy.stats.kstest(np.angle(turned) / (2 * np.pi) + 0.5, "uniform").pvalue > LEAST_P
    large = np.abs(turned) > np.mean(RADII)
    assert scipy.stats.binomtest(int(large.sum()), SETS).pvalue > LEAST_P
    assert np.abs(np.abs(turned) - np.where(large, *RADII[::-1])).max() < 8 * NOISE / 2


def test_misfit_is_the_noise_and_zero_for_any_square() -> None:
    sets = torch.from_numpy(squares(SETS, 4))
    freedom = 4 * SETS  # of eight coordinates of a set, four go into the square that fits best
    assert scipy.stats.chi2.cdf(freedom * (misfit(sets) / NOISE) ** 2, freedom) == pytest.approx(0.5, abs=0.5 - LEAST_P)
    corners = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)
    exact = torch.view_as_real(3 - 2j + (0.3 + 0.9j) * corners)[None]
    assert misfit(exact) < NOISE**8
    moved = exact.clone()
    moved[0, 2, 0] += 1.0
    # A mode of each frequency gets a quarter of the square of the shift; two of them are no square's.
    assert misfit(moved) ** 2 == pytest.approx(2 / 16)


def test_the_dataset_has_the_corners_row_by_row() -> None:
    dataset = open_dataset(DataConfig(name="squares"))
    x, labels = dataset.get(np.array([7, 0]), torch.Generator())
    assert dataset.shape == tuple(x.shape[1:]) == (2, 2, 2) and dataset.num_classes == 0 and not labels.any()
    sets = squares(len(dataset), 0)
    assert np.array_equal(x[0].permute(1, 2, 0).reshape(4, 2).numpy(), sets[7])
    assert torch.equal(as_sets(as_images(sets[:5])), torch.from_numpy(sets[:5]))


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="count 0"):
        squares(0, 0)
