"""The objectives: Terminal Velocity Matching, flow matching and MeanFlow, one function each.

A network F(x, t, s, label, beta) gives the displacement f = (s - t) a F from time t to time s <= t, with a = w in the
scaled form and a = 1 else, so that u(x, s) = a F(x, s, s) is its velocity; beta = 1/w. A star marks the target network,
which gets no gradient. |.|^2 is a mean over the elements of an image. Every term carries the factor 1/w^2.

Non-finite numbers go out as they are: the trainer names them and stops.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from ..finite import require_finite
from . import path
from .path import per_image
from .time_sampling import TimeConfig, sample_times

Maybe = Tensor | None
OBJECTIVES = ("tvm", "flow", "meanflow")


class Network(Protocol):
    """A `dit.DiT`, or anything that is called like one."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor,
        beta: Maybe = None,
        tangents: tuple[Maybe, Maybe, Maybe] | None = None,
        detach: bool = False,
    ) -> Any:
        """F, or (F, F_t) with tangents."""


class Terms(NamedTuple):
    """A loss for each image, [B], = velocity (terminal-velocity term) + flow (flow-matching term)."""

    loss: Tensor
    velocity: Tensor
    flow: Tensor


class Batch(NamedTuple):
    """What a loss needs: data x0 and noise x1 [B, C, H, W], and for each image [B] its label (after dropout), guidance
    w (1 where the label was dropped), times t, s, s2 and the label that means "no class"."""

    x0: Tensor
    x1: Tensor
    labels: Tensor
    w: Tensor
    t: Tensor
    s: Tensor
    s2: Tensor
    no_class: Tensor


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which objective, and with what guidance.

    Raises:
        ValueError: for a value out of range.
    """

    objective: Literal["tvm", "flow", "meanflow"] = "tvm"  # Terminal Velocity Matching, flow matching, MeanFlow
    w: float = 2.0  # guidance; 1 is none
    w_random: tuple[float, float] | None = None  # w_min,w_max: guidance drawn for each image, `w` unused
    w_uniform: Literal["beta", "w"] = "beta"  # what is uniform there: beta = 1/w in [1/w_max, 1/w_min], or w itself
    scaled: bool = True  # whether the displacement is (s - t) w F, or (s - t) F
    detach: bool = False  # whether no gradient flows through dF/ds (tvm only)
    label_dropout: float = 0.1  # probability of training an image without its class and with w = 1

    def __post_init__(self) -> None:
        require_finite(self)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {OBJECTIVES}, got {self.objective!r}")
        if not self.w > 0:
            raise ValueError(f"w: expected a positive number, got {self.w!r}")
        if self.w_random is not None and not 0 < self.w_random[0] <= self.w_random[1]:
            raise ValueError(f"w_random: expected 0 < w_min <= w_max, got {self.w_random!r}")
        if self.w_uniform not in ("beta", "w"):
            raise ValueError(f"w_uniform: expected 'beta' or 'w', got {self.w_uniform!r}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout: expected a probability in [0, 1], got {self.label_dropout!r}")


def make_batch(
    x0: Tensor, labels: Tensor, config: LossConfig, time_config: TimeConfig, num_classes: int, generator: Generator
) -> Batch:
    """Draws noise, times, guidance and label dropout for images x0 [B, C, H, W] with labels int64 [B].

    All is drawn on the CPU with `generator`, so that it does not depend on the device, then moved to x0's device, noise
    and scalars in x0's dtype. Images whose label is num_classes ("no class") have w = 1 like those whose label was
    dropped. Raises ValueError for labels of another shape, type or range.
    """
    count, kind = len(x0), (labels.dtype, tuple(labels.shape))
    if kind != (torch.int64, (count,)):
        raise ValueError(f"labels: expected torch.int64 of shape ({count},), got {kind[0]} of shape {kind[1]}")
    if count and not 0 <= labels.min() <= labels.max() <= num_classes:
        span = f"{labels.min().item()}..{labels.max().item()}"
        raise ValueError(f"labels: expected 0..{num_classes} ({num_classes} = no class), got {span}")
    t, s, s2 = (time.to(x0) for time in sample_times(time_config, count, generator))
    w = _guidance(config, count, generator)
    dropped = torch.rand(count, generator=generator) < config.label_dropout
    x1 = torch.randn(x0.shape, generator=generator)
    labels = torch.where(dropped.to(labels.device), num_classes, labels).to(x0.device)
    w = w.to(x0).masked_fill(labels == num_classes, 1.0)
    return Batch(x0, x1.to(x0), labels, w, t, s, s2, torch.full_like(labels, num_classes))


def _guidance(config: LossConfig, count: int, generator: Generator) -> Tensor:
    """w [B], float64: constant, or with U uniform in [0, 1)

    1/w = 1/w_max + (1/w_min - 1/w_max) U    (w_uniform = "beta": density of w proportional to 1/w^2)
    w   = w_min + (w_max - w_min) U          (w_uniform = "w": as the published code of arXiv 2511.19797 draws it)
    """
    if config.w_random is None:
        return torch.full((count,), config.w, dtype=torch.float64)
    least, most = config.w_random
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    if config.w_uniform == "w":
        return least + (most - least) * uniform
    return 1 / (1 / most + (1 / least - 1 / most) * uniform)


def terms(network: Network, target: Network, batch: Batch, config: LossConfig, *, guidance: bool = True) -> Terms:
    """The objective that `config` names; `guidance`: whether the networks take beta."""
    if config.objective == "tvm":
        return tvm_loss(network, target, batch, scaled=config.scaled, detach=config.detach, guidance=guidance)
    loss = flow_loss if config.objective == "flow" else meanflow_loss
    return loss(network, target, batch, scaled=config.scaled, guidance=guidance)


def tvm_loss(
    network: Network, target: Network, batch: Batch, *, scaled: bool, detach: bool, guidance: bool = True
) -> Terms:
    """Terminal Velocity Matching; Zhou et al., arXiv 2511.19797:

        1/w^2 ( |df/ds(x_t, t, s) - sg u*(x_t + sg f, s)|^2 1[t != s] + flow ),   df/ds = a (F + (s - t) dF/ds)

    with flow as in `flow_loss`.

    Args:
        network, target: called like a `dit.DiT`; the target under no_grad.
        batch: as `make_batch` gives it.
        scaled: a = w, else a = 1.
        detach: no gradient flows through dF/ds.
        guidance: whether the networks take beta.

    Returns: Terms, each [B], differentiable once in reverse through `network`.
    """
    beta, a = _beta(batch, guidance), _factor(batch, scaled)
    gap = per_image(batch.s - batch.t)
    x_t = path.point(batch.x0, batch.x1, batch.t)
    tangents = (None, None, torch.ones_like(batch.s))
    F, dF_ds = network(x_t, batch.t, batch.s, batch.labels, beta, tangents, detach)
    df_ds = a * (F + gap * dF_ds)
    with torch.no_grad():
        end = x_t + gap * a * F
        velocity_at_end = a * target(end, batch.s, batch.s, batch.labels, beta)
    velocity = _mean_square(df_ds - velocity_at_end) * (batch.t != batch.s) / batch.w.square()
    flow = _flow_term(network, target, batch, scaled=scaled, guidance=guidance)
    return Terms(velocity + flow, velocity, flow)


def flow_loss(network: Network, target: Network, batch: Batch, *, scaled: bool, guidance: bool = True) -> Terms:
    """Guided flow matching at time s'; Lipman et al., arXiv 2210.02747, Tang et al., arXiv 2502.12154:

        1/w^2 |u(x_s', s') - (w v + (1 - w) sg u*(x_s', s', no class, w = 1))|^2

    Arguments and result as in `tvm_loss`, with a velocity term of zero.
    """
    flow = _flow_term(network, target, batch, scaled=scaled, guidance=guidance)
    return Terms(flow, torch.zeros_like(flow), flow)


def meanflow_loss(network: Network, target: Network, batch: Batch, *, scaled: bool, guidance: bool = True) -> Terms:
    """MeanFlow with guidance; Geng et al., arXiv 2505.13447:

        1/w^2 |a F - sg( v_w - (t - s) a dF/dt )|^2,   v_w = w v + (1 - w) u*(x_t, t, no class, w = 1)

    where dF/dt is taken along (x_t, t, s) = (v_w, 1, 0). Without their adaptive weights. Arguments and result as in
    `tvm_loss`; the loss counts as flow term where t = s, and as velocity term elsewhere.
    """
    beta, a = _beta(batch, guidance), _factor(batch, scaled)
    x_t = path.point(batch.x0, batch.x1, batch.t)
    v = _guided_velocity(target, batch, x_t, batch.t, guidance)
    F, dF_dt = network(x_t, batch.t, batch.s, batch.labels, beta, (v, torch.ones_like(batch.t), None), True)
    goal = v - per_image(batch.t - batch.s) * a * dF_dt
    loss = _mean_square(a * F - goal.detach()) / batch.w.square()
    is_flow = batch.t == batch.s
    return Terms(loss, loss * ~is_flow, loss * is_flow)


def _flow_term(network: Network, target: Network, batch: Batch, *, scaled: bool, guidance: bool) -> Tensor:
    x = path.point(batch.x0, batch.x1, batch.s2)
    u = _factor(batch, scaled) * network(x, batch.s2, batch.s2, batch.labels, _beta(batch, guidance))
    return _mean_square(u - _guided_velocity(target, batch, x, batch.s2, guidance)) / batch.w.square()


def _guided_velocity(target: Network, batch: Batch, x: Tensor, time: Tensor, guidance: bool) -> Tensor:
    """w v + (1 - w) u*(x, time, no class, w = 1), without gradient."""
    with torch.no_grad():
        unguided = target(x, time, time, batch.no_class, torch.ones_like(batch.w) if guidance else None)
        w = per_image(batch.w)
        return w * path.velocity(batch.x0, batch.x1) + (1 - w) * unguided


def _beta(batch: Batch, guidance: bool) -> Maybe:
    return 1 / batch.w if guidance else None


def _factor(batch: Batch, scaled: bool) -> Tensor:
    """a as [B, 1, 1, 1]."""
    return per_image(batch.w if scaled else torch.ones_like(batch.w))


def _mean_square(x: Tensor) -> Tensor:
    """The mean of x^2 over an image, [B]."""
    return x.square().flatten(1).mean(1)
