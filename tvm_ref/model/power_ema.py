"""Post-hoc EMA: averages of the weights over a run, whose length is chosen after training; Karras et al. (EDM2).

With theta(tau) the weights of step ceil(tau), the average of profile gamma at step t is (arXiv 2312.02696, section 3)

    theta_gamma(t) = integral_0^t p(tau; t, gamma) theta(tau) dtau
    p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1)

Its relative width, the standard deviation of the profile divided by t, is

    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))

While a network trains, an average is updated once a step, which is exact for weights that change only at steps:

    theta_gamma(t) = beta theta_gamma(t - 1) + (1 - beta) theta(t),    beta = (1 - 1/t)^(gamma + 1)

Afterwards, the average of any other profile p is approximated by sum_i x_i theta_i, of stored averages with profiles
p_i, where x minimises |sum_i x_i p_i - p|^2: A x = b, A_ij = <p_i, p_j>, b_i = <p_i, p>. For t_a <= t_b,

    <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) (t_a / t_b)^gamma_b / ((gamma_a + gamma_b + 1) t_b)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .ema import local_weights

NARROWEST = 1e-6  # sigma_rel of about the last weights alone
WIDEST = math.sqrt(1 / 12)  # sigma_rel of gamma = 0, the plain mean of all steps


class Profile(NamedTuple):
    """Which average: of the weights of steps 1 to `step`, with the exponent `gamma` > 0."""

    step: int
    gamma: float


class Combination(NamedTuple):
    """How to combine stored averages.

    factors: [n], float64; error: |sum_i x_i p_i - p| / |p|, of the profiles; amplification: sum_i |x_i|, by which
    rounding of the stored averages may grow.
    """

    factors: np.ndarray
    error: float
    amplification: float


class PowerAverage:
    """Updates an average of profile gamma, in place and in the weights' dtype.

    average, network: as in `ema.Average`. sigma_rel: the relative width; raises ValueError as `gamma_of`.
    """

    def __init__(self, average: nn.Module, network: nn.Module, sigma_rel: float) -> None:
        self._average, self._network, self._gamma = local_weights(average), local_weights(network), gamma_of(sigma_rel)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights of `step`, counted from 1."""
        new = 1.0 if step == 1 else -math.expm1((self._gamma + 1) * math.log1p(-1 / step))
        torch._foreach_lerp_(self._average, self._network, new)


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has this relative width: the positive root of
    gamma^3 + 7 gamma^2 + (16 - sigma_rel^-2) gamma + 12 - sigma_rel^-2.

    Raises ValueError unless `NARROWEST` <= sigma_rel < `WIDEST`.
    """
    if not NARROWEST <= sigma_rel < WIDEST:
        expected = f"a number from {NARROWEST:g} to less than {WIDEST:.4g}"
        raise ValueError(f"sigma_rel: expected {expected}, got {sigma_rel!r}")
    square = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16 - square, 12 - square])
    return float(max(roots.real))


def sigma_rel_of(gamma: float) -> float:
    """The relative width of the profile with this exponent."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def combine(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """Finds how to combine averages of the profiles `stored` into one of the profile `wanted`, in float64."""
    norms = np.sqrt(np.diagonal(_products(stored, stored)))
    size = math.sqrt(_products([wanted], [wanted])[0, 0])
    # Profiles of length one, so that the rows of A are of one scale.
    among = _products(stored, stored) / np.outer(norms, norms)
    against = _products(stored, [wanted])[:, 0] / (norms * size)
    scaled = np.linalg.lstsq(among, against, rcond=None)[0]
    error = math.sqrt(max(0.0, float(scaled @ among @ scaled - 2 * scaled @ against + 1)))
    factors = scaled * size / norms
    return Combination(factors, error, float(np.abs(factors).sum()))


def _products(ones: Sequence[Profile], others: Sequence[Profile]) -> np.ndarray:
    """The inner products of profiles, float64 [ones, others]."""
    step_a, gamma_a = (x[:, None] for x in np.array(ones, dtype=np.float64).T)
    step_b, gamma_b = (x[None, :] for x in np.array(others, dtype=np.float64).T)
    ratio = np.where(step_a <= step_b, (step_a / step_b) ** gamma_b, (step_b / step_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))
