"""Shortcut models: a jump is held against two jumps of half its length, without a JVP."""

import torch

from . import path
from .parts import Batch, Network, Terms, beta_of, factor, guided_velocity, mean_square, split_by_time
from .path import per_image


def shortcut_loss(
    network: Network, target: Network, batch: Batch, *, scaled: bool, guidance: bool = True, guided: bool = True
) -> Terms:
    """Shortcut models; Frans et al., arXiv 2410.12557, with the midpoint m = (t + s) / 2:

        1/w^2 |a F(x_t, t, s) - a/2 sg( F*(x_t, t, m) + F*(x_m, m, s) )|^2,   x_m = x_t + (m - t) a F*(x_t, t, m)
        1/w^2 |a F(x_t, t, t) - ( w v + (1 - w) u*(x_t, t, no class, w = 1) )|^2                        where t = s

    Times are those of the batch; theirs are multiples of 1/128, with jumps of 1, 1/2, 1/4 and so on. Their share of
    t = s is `TimeConfig.equal_share`, 0.75. Arguments and result as in `loss.tvm_loss`; the loss counts as flow term
    where t = s, and as velocity term elsewhere.
    """
    beta, a = beta_of(batch, guidance), factor(batch, scaled)
    x_t = path.point(batch.x0, batch.x1, batch.t)
    with torch.no_grad():
        middle = (batch.t + batch.s) / 2
        first = a * target(x_t, batch.t, middle, batch.labels, beta)
        x_m = x_t + per_image(middle - batch.t) * first
        second = a * target(x_m, middle, batch.s, batch.labels, beta)
        v = guided_velocity(target, batch, x_t, batch.t, guidance, guided)
        goal = torch.where(per_image(batch.t == batch.s), v, (first + second) / 2)
    F = network(x_t, batch.t, batch.s, batch.labels, beta)
    return split_by_time(mean_square(a * F - goal) / batch.w.square(), batch)
