"""Bounds on a row's error hold for sums of errors whose law is known."""

import math

import pytest
import torch

from verify.budget.noise import Bound, Noise

WIDTH, ROWS, DRAWS = 64, 8, 200_000


def noise(weights: torch.Tensor, spread: float, shared: float, stored: float) -> Noise:
    """Rows that multiply errors of tile elements and of statistics, of these weights, by orthogonal rows."""
    effective = weights.sum().square() / weights.square().sum()
    each = torch.full((ROWS, WIDTH), 1 / WIDTH, dtype=torch.float64)
    return Noise(
        spread * each, effective.expand(ROWS), shared * each, effective.expand(ROWS), stored * each, ROWS,
        torch.full((1,), 1 / WIDTH, dtype=torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.1, 0.05], [1.0] * 4], ids=["one", "nearly one", "four"])
@pytest.mark.parametrize(("spread", "shared", "stored"), [(1.0, 1.0, 0.0), (1.0, 0.7, 1.0), (0.5, 1.0, 0.1)])
def test_a_row_stays_within_its_bound(weights: list[float], spread: float, shared: float, stored: float) -> None:
    """A tile element's error and its statistic's act along the same row: they add up before they are squared."""
    share = torch.tensor(weights, dtype=torch.float64)
    share /= share.sum()
    bound: Bound = noise(share, spread, shared, stored).bound()
    generator = torch.Generator().manual_seed(0)
    along = (
        torch.randn(DRAWS, len(weights), generator=generator, dtype=torch.float64) * ((spread + shared) * share).sqrt()
    )
    other = torch.randn(DRAWS, WIDTH, generator=generator, dtype=torch.float64) * math.sqrt(stored / WIDTH)
    other[:, : len(weights)] += along
    exceeded_once_in_10_000 = other.norm(dim=-1).quantile(0.9999).item()  # 3.9 deviations; the bound is 4.9, for 8 rows
    assert exceeded_once_in_10_000 < bound.rows.min() < 2 * exceeded_once_in_10_000
