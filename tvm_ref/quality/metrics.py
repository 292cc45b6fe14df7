"""Metrics of sample quality: Frechet distance (FID), exact 2-Wasserstein distance, precision, recall and coverage.

All of them compare two sets of vectors (points, pixels or Inception features), one vector per row.
"""

from typing import NamedTuple

import numpy as np
import ot
import torch
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

MOST_ITERATIONS = 10_000_000  # limit for the network simplex, which reaches the optimum long before


class Moments(NamedTuple):
    """Mean [d] and (unbiased) covariance [d, d] of a set of vectors, float64."""

    mean: Tensor
    covariance: Tensor


class _AsTheyAre(nn.Module):
    """An identity in place of torchmetrics' feature network, for vectors that are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(generated: Tensor, real: Tensor | Moments) -> float:
    """||mu1 - mu2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians fitted to two sets of vectors.

    generated: [n, d]; real: [m, d], or the moments of such a set; both floating-point. Computed in float64 by
    torchmetrics. With Inception features this is FID. It is the squared distance, with an upward bias of order 1/n.

    Raises ValueError for shapes that do not match, fewer than two rows, and values that are not finite.
    """
    generated = _rows("generated", generated)
    width = generated.shape[1]
    # Only this process computes it: it must not wait for the others of a process group.
    metric = FrechetInceptionDistance(feature=_AsTheyAre(width), sync_on_compute=False).set_dtype(torch.float64)
    metric.update(generated, real=False)
    if isinstance(real, Moments):
        mean, covariance = real.mean.double(), real.covariance.double()
        if mean.shape != (width,) or covariance.shape != (width, width):
            raise ValueError(
                f"expected moments of {width} features, got a mean {list(mean.shape)} "
                f"and a covariance {list(covariance.shape)}"
            )
        # The state that update() would leave for two vectors with these moments.
        metric.real_features_num_samples = torch.tensor(2)
        metric.real_features_sum = 2 * mean
        metric.real_features_cov_sum = covariance + 2 * torch.outer(mean, mean)
    else:
        real = _rows("real", real)
        if real.shape[1] != width:
            raise ValueError(f"expected vectors of one length, got {width} generated and {real.shape[1]} real")
        metric.update(real, real=True)
    return float(metric.compute())


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """(min over couplings of E ||x - y||^2)^(1/2) between two sets of equally weighted points, exactly (by POT).

    x: [n, d], y: [m, d]; floating-point. Time grows like n^2 to n^3: use a few thousand points.

    Raises ValueError for shapes that do not match and values that are not finite, RuntimeError if no optimum was found.
    """
    x, y = _rows("x", x), _rows("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected points of one dimension, got {x.shape[1]} and {y.shape[1]}")
    squared, log = ot.emd2([], [], ot.dist(x.numpy(), y.numpy()), numItermax=MOST_ITERATIONS, log=True)
    if log["warning"]:
        raise RuntimeError(f"no optimal coupling of {len(x)} and {len(y)} points found: {log['warning']}")
    return float(np.sqrt(max(squared, 0.0)))


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]: precision, of samples covered by the data; recall, of data covered by the samples."""

    precision: float
    recall: float


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, Eq. 1 and 2).

    A set covers the balls around its vectors whose radius is the distance to the `neighbours`-th nearest neighbour in
    the set. precision: the fraction of generated vectors [n, d] that `real` [m, d] covers; recall: the reverse.
    Computed by scikit-learn in the vectors' own dtype.

    Raises ValueError for shapes that do not match, sets of at most `neighbours` vectors, values that are not finite.
    """
    for name, vectors in (("generated", generated), ("real", real)):
        _rows(name, vectors)
        if len(vectors) <= neighbours:
            raise ValueError(f"{name}: expected more than {neighbours} vectors, got {len(vectors)}")
    if generated.shape[1] != real.shape[1]:
        raise ValueError(f"expected vectors of one length, got {generated.shape[1]} and {real.shape[1]}")
    g, r = generated.cpu().numpy(), real.cpu().numpy()
    radius_g, radius_r = (_radii(vectors, neighbours) for vectors in (g, r))
    precise, recalled = [], np.zeros(len(r), dtype=bool)
    first = 0
    for distance in pairwise_distances_chunked(g, r):  # some rows of g against all of r
        precise.append((distance <= radius_r).any(axis=1))
        recalled |= (distance <= radius_g[first : first + len(distance), None]).any(axis=0)
        first += len(distance)
    return PrecisionRecall(float(np.concatenate(precise).mean()), float(recalled.mean()))


def coverage(generated: Tensor, real: Tensor, neighbours: int = 5) -> float:
    """The fraction of real vectors [m, d] that have a generated one [n, d] in their ball, whose radius is the distance
    to the `neighbours`-th nearest other real vector (Naeem et al., arXiv 2002.09797, Eq. 9). In [0, 1].

    Unlike recall it does not grow by generated vectors that lie far out. Raises as `precision_recall`.
    """
    for name, vectors in (("generated", generated), ("real", real)):
        _rows(name, vectors)
    if len(real) <= neighbours:
        raise ValueError(f"real: expected more than {neighbours} vectors, got {len(real)}")
    if generated.shape[1] != real.shape[1]:
        raise ValueError(f"expected vectors of one length, got {generated.shape[1]} and {real.shape[1]}")
    g, r = generated.cpu().numpy(), real.cpu().numpy()
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(g).kneighbors(r)[0][:, 0]
    return float((nearest <= _radii(r, neighbours)).mean())


def _radii(vectors: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance from each vector to its `neighbours`-th nearest neighbour."""
    distance, _ = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(vectors).kneighbors()
    return distance[:, -1]


def _rows(name: str, vectors: Tensor) -> Tensor:
    """Checks `vectors` and returns them as float64 on the CPU."""
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"{name}: expected at least two vectors [n, d], got {list(vectors.shape)}")
    if not vectors.is_floating_point() or not vectors.isfinite().all():
        raise ValueError(f"{name}: expected finite floating-point numbers, got {vectors.dtype} or some that are not")
    return vectors.detach().to("cpu", torch.float64)
