"""Which objective a run has, the batch it gets, and the objectives of flow maps: TVM, flow matching and MeanFlow.

What a, u, a star and |.|^2 mean is said in parts.py. Non-finite numbers go out as they are: the trainer names them and
stops.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from ..finite import require_finite
from . import path
from .consistency import consistency_loss
from .improved_meanflow import improved_meanflow_loss
from .parts import (
    Batch,
    Call,
    Goal,
    Network,
    Terms,
    adaptively_weighted,
    beta_of,
    factor,
    guided_of,
    guided_velocity,
    mean_square,
    split_by_time,
    unguided,
    velocities,
)
from .path import per_image
from .shortcut import shortcut_loss
from .time_sampling import TimeConfig, sample_times

# Terminal Velocity Matching, flow matching, MeanFlow, improved MeanFlow, continuous-time consistency, shortcut models
Objective = Literal["tvm", "flow", "meanflow", "imf", "scm", "shortcut"]
OBJECTIVES = get_args(Objective)
MOST_W = 1e6  # guidance beyond it, or below its inverse, overflows in w^3 or vanishes in 1/w
AT_T = OBJECTIVES[2:]  # their flow terms are at time t, where t = s; s' is not used


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which objective, and with what guidance.

    Raises:
        ValueError: for a value out of range.
    """

    objective: Objective = "tvm"  # Terminal Velocity Matching, flow matching, MeanFlow, improved MeanFlow,
    # continuous-time consistency or shortcut models
    w: float = 2.0  # guidance; 1 is none
    w_random: tuple[float, float] | None = None  # w_min,w_max: guidance drawn for each image, `w` unused
    w_uniform: Literal["beta", "w", "balanced"] = "beta"  # what is uniform there: beta = 1/w in [1/w_max, 1/w_min], w
    # itself, or the weight that w gets in the loss
    scaled: bool = True  # whether the displacement is (s - t) w F, or (s - t) F
    detach: bool = False  # whether no gradient flows through dF/ds (tvm only)
    adaptive_power: float = 0.0  # the loss is divided by (itself + 0.001) to this power, without gradient (meanflow
    # and imf only); 0: it is not
    label_dropout: float = 0.1  # probability of training an image without its class and with w = 1

    def __post_init__(self) -> None:
        require_finite(self)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {OBJECTIVES}, got {self.objective!r}")
        if not self.w > 0:
            raise ValueError(f"w: expected a positive number, got {self.w!r}")
        if odd := [w for w in (self.w, *(self.w_random or ())) if w > 0 and not 1 / MOST_W <= w <= MOST_W]:
            raise ValueError(f"w: expected guidance from {1 / MOST_W:g} to {MOST_W:g}, got {odd[0]!r}")
        if self.w_random is not None and not 0 < self.w_random[0] <= self.w_random[1]:
            raise ValueError(f"w_random: expected 0 < w_min <= w_max, got {self.w_random!r}")
        if self.w_uniform not in ("beta", "w", "balanced"):
            raise ValueError(f"w_uniform: expected 'beta', 'w' or 'balanced', got {self.w_uniform!r}")
        if self.adaptive_power < 0:
            raise ValueError(f"adaptive_power: expected at least 0, got {self.adaptive_power!r}")
        if self.adaptive_power and self.objective not in ("meanflow", "imf"):
            raise ValueError(f"adaptive_power: expected 0 for objective {self.objective!r}, got {self.adaptive_power}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout: expected a probability in [0, 1], got {self.label_dropout!r}")

    @property
    def guides(self) -> bool:
        """Whether any image may have w != 1, and so needs an unguided velocity."""
        return self.w != 1 if self.w_random is None else self.w_random != (1, 1)


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
    w^3 = w_min^3 + (w_max^3 - w_min^3) U    (w_uniform = "balanced": density proportional to w^2, which the factor
                                              1/w^2 of the loss makes uniform)
    """
    if config.w_random is None:
        return torch.full((count,), config.w, dtype=torch.float64)
    least, most = config.w_random
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    if config.w_uniform == "w":
        return least + (most - least) * uniform
    if config.w_uniform == "balanced":
        return (least**3 + (most**3 - least**3) * uniform) ** (1 / 3)
    return 1 / (1 / most + (1 / least - 1 / most) * uniform)


def terms(network: Network, target: Network, batch: Batch, config: LossConfig, *, guidance: bool = True) -> Terms:
    """The loss terms, each [B], of the objective that `config` names; arguments as in `tvm_loss`."""
    options = {"scaled": config.scaled, "guidance": guidance, "guided": config.guides}
    match config.objective:
        case "tvm":
            return tvm_loss(network, target, batch, detach=config.detach, **options)
        case "flow":
            return flow_loss(network, target, batch, **options)
        case "meanflow":
            return meanflow_loss(network, target, batch, adaptive_power=config.adaptive_power, **options)
        case "imf":
            return improved_meanflow_loss(network, target, batch, adaptive_power=config.adaptive_power, **options)
        case "scm":
            return consistency_loss(network, target, batch, **options)
        case "shortcut":
            return shortcut_loss(network, target, batch, **options)


def tvm_loss(
    network: Network, target: Network, batch: Batch, *, scaled: bool, detach: bool, guidance: bool = True,
    guided: bool = True,
) -> Terms:  # fmt: skip
    """Terminal Velocity Matching; Zhou et al., arXiv 2511.19797:

        1/w^2 ( |df/ds(x_t, t, s) - sg u*(x_t + sg f, s)|^2 1[t != s] + flow ),   df/ds = a (F + (s - t) dF/ds)

    with flow as in `flow_loss`.

    Args:
        network, target: called like a `dit.DiT`; the target under no_grad.
        batch: as `make_batch` gives it.
        scaled: a = w, else a = 1.
        detach: no gradient flows through dF/ds.
        guidance: whether the networks take beta.
        guided: False says that w = 1 for every image. Then no unguided velocity is computed, which counts for nothing.

    The target is called once, with the images of both terms.

    Returns: Terms, each [B], differentiable once in reverse through `network`.
    """
    velocity, goal = tvm_velocity_term(
        network, target, batch, scaled=scaled, detach=detach, guidance=guidance, guided=guided
    )
    flow = flow_term(network, batch, goal, scaled=scaled, guidance=guidance)
    return Terms(velocity + flow, velocity, flow)


def tvm_velocity_term(
    network: Network, target: Network, batch: Batch, *, scaled: bool, detach: bool, guidance: bool = True,
    guided: bool = True,
) -> tuple[Tensor, Goal]:  # fmt: skip
    """The first term of `tvm_loss`, [B], and what the second one, `flow_term`, needs of the target."""
    beta, a = beta_of(batch, guidance), factor(batch, scaled)
    gap = per_image(batch.s - batch.t)
    x_t = path.point(batch.x0, batch.x1, batch.t)
    tangents = (None, None, torch.ones_like(batch.s))
    F, dF_ds = network(x_t, batch.t, batch.s, batch.labels, beta, tangents, detach)
    df_ds = a * (F + gap * dF_ds)
    with torch.no_grad():
        end = x_t + gap * a * F
        x = path.point(batch.x0, batch.x1, batch.s2)
        at_end: Call = (end, batch.s, batch.labels, beta)
        of_target = velocities(target, at_end, *[unguided(batch, x, batch.s2, guidance)] * guided)
        velocity_at_end = a * of_target[0]
        goal = Goal(x, guided_of(batch, of_target[1] if guided else None))
    return mean_square(df_ds - velocity_at_end) * (batch.t != batch.s) / batch.w.square(), goal


def flow_loss(
    network: Network, target: Network, batch: Batch, *, scaled: bool, guidance: bool = True, guided: bool = True
) -> Terms:
    """Guided flow matching at time s'; Lipman et al., arXiv 2210.02747, Tang et al., arXiv 2502.12154:

        1/w^2 |u(x_s', s') - (w v + (1 - w) sg u*(x_s', s', no class, w = 1))|^2

    Arguments and result as in `tvm_loss`, with a velocity term of zero.
    """
    x = path.point(batch.x0, batch.x1, batch.s2)
    goal = Goal(x, guided_velocity(target, batch, x, batch.s2, guidance, guided))
    flow = flow_term(network, batch, goal, scaled=scaled, guidance=guidance)
    return Terms(flow, torch.zeros_like(flow), flow)


def meanflow_loss(
    network: Network, target: Network, batch: Batch, *, scaled: bool, adaptive_power: float = 0.0,
    guidance: bool = True, guided: bool = True,
) -> Terms:  # fmt: skip
    """MeanFlow with guidance; Geng et al., arXiv 2505.13447:

        1/w^2 |a F - sg( v_w - (t - s) a dF/dt )|^2,   v_w = w v + (1 - w) u*(x_t, t, no class, w = 1)

    where dF/dt is taken along (x_t, t, s) = (v_w, 1, 0). adaptive_power: as in `adaptively_weighted`; theirs is 1.
    Their share of t = s is `TimeConfig.equal_share`, 0.75. Other arguments and result as in `tvm_loss`; the loss is a
    flow term where t = s, and a velocity term elsewhere.
    """
    beta, a = beta_of(batch, guidance), factor(batch, scaled)
    x_t = path.point(batch.x0, batch.x1, batch.t)
    v = guided_velocity(target, batch, x_t, batch.t, guidance, guided)
    F, dF_dt = network(x_t, batch.t, batch.s, batch.labels, beta, (v, torch.ones_like(batch.t), None), True)
    goal = v - per_image(batch.t - batch.s) * a * dF_dt
    loss = mean_square(a * F - goal.detach()) / batch.w.square()
    return split_by_time(adaptively_weighted(loss, adaptive_power), batch)


def flow_term(network: Network, batch: Batch, goal: Goal, *, scaled: bool, guidance: bool) -> Tensor:
    """1/w^2 |u(x, s') - goal|^2, [B]."""
    u = factor(batch, scaled) * network(goal.x, batch.s2, batch.s2, batch.labels, beta_of(batch, guidance))
    return mean_square(u - goal.velocity) / batch.w.square()
