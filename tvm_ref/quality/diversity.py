"""Diversity within classes: samples that are each good, but alike, have too small a variance."""

from torch import Tensor


def variance_ratio(samples: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """The variance within classes of samples [n, d], over that of real vectors [m, d]:

        sum_c n_c v_c(samples) / sum_c n_c v_c(real),   v_c(x) = E |x - E x|^2 over the vectors of class c (unbiased)

    n_c: samples of class c; classes with fewer than two samples or real vectors do not count. 1: as diverse as the real
    ones. labels int64 [n], [m]. Computed in float64. Raises ValueError if no class counts, or the real ones have no
    variance.
    """
    ours, reals = samples.double(), real.double()
    above = below = 0.0
    for label in labels.unique():
        one, other = ours[labels == label], reals[real_labels == label]
        if min(len(one), len(other)) >= 2:
            above += len(one) * one.var(0).sum().item()
            below += len(one) * other.var(0).sum().item()
    if below == 0:
        raise ValueError(f"samples: expected two of some class that varies, got {len(labels)} samples")
    return above / below
