"""The few-step sampler, and the cycle error, which compares the network's jumps with its own velocity."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..objective.loss import Network, Objective

Steps = Literal["jumps", "velocity", "restarts"]


def steps_of(objective: Objective) -> Steps:
    """The kind of steps that an objective trains a network for."""
    return "velocity" if objective == "flow" else "restarts" if objective == "scm" else "jumps"


def sample(
    network: Network,
    noise: Tensor,
    labels: Tensor,
    w: float,
    steps: int,
    scaled: bool,
    *,
    guidance: bool = True,
    kind: Steps = "jumps",
    new_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Maps noise [B, C, H, W] with labels int64 [B] to images of the same shape and dtype, in `steps` evaluations, for
    neighbours t > s of linspace(1, 0, steps + 1):

        x <- x + (s - t) a F(x, t, s, label, 1/w)                      jumps; Zhou et al., arXiv 2511.19797
        x <- x + (s - t) a F(x, t, t, label, 1/w)                      velocity: Euler's method; arXiv 2210.02747
        x <- (1 - s) (x - t a F(x, t, 0, label, 1/w)) + s noise_s      restarts: with new noise; arXiv 2303.01469

    with a = w in the scaled form, otherwise a = 1. The state x is float64. `guidance`: whether the network takes beta.
    `new_noise`: gives noise like the first for the steps 1, 2, ... of restarts. Not differentiable. Raises ValueError
    for fewer than one step, w <= 0, or restarts without new noise.
    """
    flow = _Flow(network, labels, w, scaled, guidance, noise.dtype)
    _check_steps(steps)
    if kind == "restarts" and new_noise is None:
        raise ValueError("new_noise: expected a function for restarts, got None")
    x = noise.double()
    with torch.no_grad():
        for number, (t, s) in enumerate(pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64))):
            if kind == "jumps":
                x = flow.jump(x, t, s)
            elif kind == "velocity":
                x = x + (s - t) * flow.velocity(x, t)
            else:
                x = flow.jump(x, t, torch.zeros_like(s))
                if s > 0 and new_noise is not None:
                    x = (1 - s) * x + s * new_noise(number + 1).double()
    return x.to(noise.dtype)


def cycle_error(
    network: Network,
    x0: Tensor,
    labels: Tensor,
    w: float,
    t: float,
    steps: int,
    scaled: bool,
    *,
    guidance: bool = True,
) -> Tensor:
    """Measures how far the cycle x0 -> x_t -> x0 ends from x0: RMS over an image, [B] float64, in units of the data.

    From time 0 to t, it follows the velocity u(x, s) = a F(x, s, s) in `steps` steps of Heun's method (two evaluations
    each, error O(steps^-2)). One jump leads back from t to 0. It is zero for the exact flow map and its velocity.
    Arguments and errors are as in `sample`; t lies in (0, 1].
    """
    flow = _Flow(network, labels, w, scaled, guidance, x0.dtype)
    _check_steps(steps)
    if not 0 < t <= 1:
        raise ValueError(f"t: expected a time in (0, 1], got {t!r}")
    x = start = x0.double()
    with torch.no_grad():
        for now, later in pairwise(torch.linspace(0, t, steps + 1, dtype=torch.float64)):
            u = flow.velocity(x, now)
            u_later = flow.velocity(x + (later - now) * u, later)
            x = x + (later - now) * (u + u_later) / 2
        back = flow.jump(x, torch.tensor(t, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    return (back - start).square().flatten(1).mean(1).sqrt()


@dataclass(frozen=True)
class _Flow:
    """The flow map of a network for fixed labels and guidance. States are float64; the network is called in `dtype`."""

    network: Network
    labels: Tensor
    w: float
    scaled: bool
    guidance: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.w > 0:
            raise ValueError(f"w: expected a positive number, got {self.w!r}")

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """u(x, t)."""
        return self._average_velocity(x, t, t)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x + f(x, t, s)."""
        return x + (s - t) * self._average_velocity(x, t, s)

    def _average_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t_, s_, beta = (
            torch.full((len(x),), float(value), dtype=self.dtype, device=x.device) for value in (t, s, 1 / self.w)
        )
        F = self.network(x.to(self.dtype), t_, s_, self.labels, beta if self.guidance else None)
        return (self.w if self.scaled else 1.0) * F.double()


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
