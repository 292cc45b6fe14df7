"""What the objectives are written with: the batch they get, the terms they give, and the guided velocity.

A network F(x, t, s, label, beta) gives the displacement f = (s - t) a F from time t to time s <= t, with a = w in the
scaled form and a = 1 else, so that u(x, s) = a F(x, s, s) is its velocity; beta = 1/w. A star marks the target network,
which gets no gradient. |.|^2 is a mean over the elements of an image. Every term carries the factor 1/w^2.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import path
from .path import per_image

Maybe = Tensor | None
Call = tuple[Tensor, Tensor, Tensor, Maybe]  # of a network at s = t: x, time, labels, beta
NORM_EPS = 1e-3  # c of the adaptive weight


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
    """A loss for each image, [B], in its dtype: velocity (terminal-velocity term) + flow (flow-matching term)."""

    loss: Tensor
    velocity: Tensor
    flow: Tensor


class Batch(NamedTuple):
    """What a loss needs: data x0 and noise x1 [B, C, H, W], and for each image [B] its label (after dropout), guidance
    w (1 where the label was dropped), times t >= s and s2 (s') in [0, 1], and the label that means "no class".

    Labels are int64; all others have the dtype of x0."""

    x0: Tensor
    x1: Tensor
    labels: Tensor
    w: Tensor
    t: Tensor
    s: Tensor
    s2: Tensor
    no_class: Tensor


class Goal(NamedTuple):
    """Images x at time s', and the velocity that a network is to have there; without gradient."""

    x: Tensor
    velocity: Tensor


@torch.no_grad()
def guided_velocity(
    target: Network, batch: Batch, x: Tensor, time: Tensor, guidance: bool, guided: bool = True
) -> Tensor:
    """w v + (1 - w) u*(x, time, no class, w = 1), without gradient; guided: whether any w differs from 1."""
    return guided_of(batch, velocities(target, unguided(batch, x, time, guidance))[0] if guided else None)


def guided_of(batch: Batch, velocity: Maybe) -> Tensor:
    """w v + (1 - w) velocity; v where there is none, since then w = 1."""
    v, w = path.velocity(batch.x0, batch.x1), per_image(batch.w)
    return v if velocity is None else w * v + (1 - w) * velocity


def unguided(batch: Batch, x: Tensor, time: Tensor, guidance: bool) -> Call:
    """The call that gives u*(x, time, no class, w = 1)."""
    return x, time, batch.no_class, torch.ones_like(batch.w) if guidance else None


def velocities(target: Network, *calls: Call) -> tuple[Tensor, ...]:
    """F(x, time, time, label, beta) of the target for each of some calls of equal size, computed as one."""
    x, time, labels = (torch.cat(parts) for parts in list(zip(*calls, strict=True))[:3])
    betas = [beta for *_, beta in calls if beta is not None]
    F: Tensor = target(x, time, time, labels, torch.cat(betas) if betas else None)
    return F.chunk(len(calls))


def beta_of(batch: Batch, guidance: bool) -> Maybe:
    """1/w [B], or None where the networks take no guidance."""
    return 1 / batch.w if guidance else None


def factor(batch: Batch, scaled: bool) -> Tensor:
    """a as [B, 1, 1, 1]."""
    return per_image(batch.w if scaled else torch.ones_like(batch.w))


def mean_square(x: Tensor) -> Tensor:
    """The mean of x^2 over an image, [B]."""
    return x.square().flatten(1).mean(1)


def adaptively_weighted(loss: Tensor, power: float) -> Tensor:
    """loss / sg(loss + 10^-3)^power for losses [B]; Geng et al., arXiv 2505.13447, section 4.3. 0: as it is."""
    return loss / (loss.detach() + NORM_EPS) ** power if power else loss


def split_by_time(loss: Tensor, batch: Batch) -> Terms:
    """A loss [B] that counts as flow term where t = s, and as velocity term elsewhere."""
    is_flow = batch.t == batch.s
    return Terms(loss, loss * ~is_flow, loss * is_flow)
