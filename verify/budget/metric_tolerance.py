"""Error budgets of quality metrics and of data (Frechet distances, flows, normalisation), from the eps of their type.

u is half of eps. A result of k roundings of numbers up to `scale` is off by at most k u scale, to first order; the
functions below say which roundings they count.
"""

import numpy as np

EPS32, EPS64 = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)


def normalisation_bound(z: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Of (z - mean) / deviation in z's type: the roundings are those of mean (u |mean|), of the difference (u |z -
    mean|), of deviation and of the quotient (2 u |z - mean| / deviation); |z - mean| <= |z| + |mean|."""
    u = float(np.finfo(z.dtype).eps) / 2
    return 4 * u * (np.abs(z.astype(np.float64)) + np.abs(mean)) / deviation


def frechet_bound(features: int, scale: float) -> float:
    """Of a squared Frechet distance in float64 between sets whose second moments about 0 have traces up to `scale`.

    Sums of squares and the products of d x d covariances lose d eps of scale^2. So each of the d eigenvalues of C1 C2
    moves by at most d eps scale^2 (times the condition of its eigenvectors, for which 4 is allowed: the tests take
    commuting or mild covariances), and since |sqrt(a) - sqrt(b)| <= sqrt(|a - b|), the trace of the root by d
    sqrt(4 d eps) scale; it counts twice. All else loses eps times `scale` and is covered.
    """
    return 4 * features * float(np.sqrt(features * EPS64)) * scale


def wasserstein_bound(dimensions: int, scale: float) -> float:
    """Of a 2-Wasserstein distance in float64 between points of norm up to `scale`: a squared distance |x|^2 + |y|^2 -
    2 x.y is off by at most (d + 4) eps (2 scale)^2, a mean of them by as much, and |sqrt(a) - sqrt(b)| <=
    sqrt(|a - b|)."""
    return 2 * float(np.sqrt((dimensions + 4) * EPS64)) * scale


def single_precision_bound(roundings: int, scale: float) -> float:
    """Of a float32 result of so many roundings of numbers up to `scale`."""
    return roundings * EPS32 / 2 * scale


def flow_bound(steps: int, scale: float) -> float:
    """Of a float64 state after so many steps x + h u, numbers up to `scale`: h, h u and the sum, with two velocities at
    most, round six times a step."""
    return 6 * steps * EPS64 / 2 * scale


def frechet_change(distance: float, features: int, pixel_error: float) -> float:
    """By how much a squared Frechet distance changes when every feature moves by at most `pixel_error`.

    Its root is a metric between Gaussians and at most the 2-Wasserstein distance of the sets (Gelbrich), so the root
    changes by at most shift = sqrt(2 d) pixel_error, the 2 for n / (n - 1) of the unbiased covariance; on top comes
    the rounding of both distances, of features up to 1.
    """
    shift = float(np.sqrt(2 * features)) * pixel_error
    return shift * (2 * float(np.sqrt(distance)) + shift) + 2 * frechet_bound(features, 2.0 * features)
