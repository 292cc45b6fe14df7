"""The marginal velocity of the eight Gaussians in closed form, and where it carries noise exactly."""

from itertools import pairwise

import torch
from torch import Tensor

from ..data.toys import DEVIATION, RADIUS


def marginal_velocity(x: Tensor, s: float) -> Tensor:
    """v*(x, s) = E[x1 - x0 | x_s = x] for x_s = (1 - s) x0 + s x1, data x0 of the eight Gaussians and noise x1:

        v* = sum_k r_k(x) ( -c_k + (s - (1 - s) d^2) / V (x - (1 - s) c_k) ),   V = (1 - s)^2 d^2 + s^2

    with centres c_k, deviation d = 0.2, and r_k the probability of Gaussian k given x. x: float64 [n, 2]; s in [0, 1].
    Differentiable in x.
    """
    angle = torch.arange(8, dtype=x.dtype, device=x.device) * (torch.pi / 4)
    centres = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    variance = (1 - s) ** 2 * DEVIATION**2 + s**2
    apart = x[:, None] - (1 - s) * centres  # [n, 8, 2]
    share = torch.softmax(-apart.square().sum(-1) / (2 * variance), dim=1)
    along = -centres + (s - (1 - s) * DEVIATION**2) / variance * apart
    return (share[..., None] * along).sum(1)


def carried_to_data(noise: Tensor, steps: int) -> list[Tensor]:
    """Where v* carries noise float64 [n, 2]: its place at each of linspace(1, 0, steps + 1), by Heun's method."""
    places = [noise]
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, s in pairwise(times):
        x = places[-1]
        first = marginal_velocity(x, t)
        second = marginal_velocity(x + (s - t) * first, s)
        places.append(x + (s - t) * (first + second) / 2)
    return places
