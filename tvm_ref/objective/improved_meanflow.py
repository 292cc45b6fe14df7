"""Improved MeanFlow: the tangent of its derivative is the network's own velocity, not the noisy one of the data."""

import torch

from . import path
from .parts import (
    Batch,
    Network,
    Terms,
    adaptively_weighted,
    beta_of,
    factor,
    guided_velocity,
    mean_square,
    split_by_time,
)
from .path import per_image


def improved_meanflow_loss(
    network: Network,
    target: Network,
    batch: Batch,
    *,
    scaled: bool,
    adaptive_power: float = 0.0,
    guidance: bool = True,
    guided: bool = True,
) -> Terms:
    """Improved MeanFlow; Geng et al., arXiv 2512.02012:

        1/w^2 |a F + (t - s) sg(a dF/dt) - v_w|^2,   v_w = w v + (1 - w) u*(x_t, t, no class, w = 1)

    where dF/dt is taken along (x_t, t, s) = (sg u(x_t, t), 1, 0), so that the regression's input does not depend on v.
    Without their extra network output for u and their guidance as an input interval. adaptive_power: as in
    `parts.adaptively_weighted`. Other arguments and result as in `loss.tvm_loss`; the loss counts as flow term where
    t = s, and as velocity term elsewhere.
    """
    beta, a = beta_of(batch, guidance), factor(batch, scaled)
    x_t = path.point(batch.x0, batch.x1, batch.t)
    with torch.no_grad():
        u = a * network(x_t, batch.t, batch.t, batch.labels, beta)
    F, dF_dt = network(x_t, batch.t, batch.s, batch.labels, beta, (u, torch.ones_like(batch.t), None), True)
    velocity = a * F + per_image(batch.t - batch.s) * (a * dF_dt).detach()
    loss = mean_square(velocity - guided_velocity(target, batch, x_t, batch.t, guidance, guided)) / batch.w.square()
    return split_by_time(adaptively_weighted(loss, adaptive_power), batch)
