"""Continuous-time consistency training on the straight path."""

import torch

from . import path
from .parts import Batch, Network, Terms, beta_of, factor, guided_velocity, mean_square
from .path import per_image

TANGENT_EPS = 0.1  # c of the normalised tangent


def consistency_loss(
    network: Network, target: Network, batch: Batch, *, scaled: bool, guidance: bool = True, guided: bool = True
) -> Terms:
    """Continuous-time consistency (sCM); Lu & Song, arXiv 2410.11081, for x_t = (1 - t) x0 + t x1:

        1/w^2 |a F - sg( a F + g / (|g|_2 + 0.1) )|^2,   g = d/dt (x_t - t a F(x_t, t, 0)) = v_w - a F - t a dF/dt

    where F is taken at s = 0, dF/dt along (x_t, t, s) = (v_w, 1, 0), v_w = w v + (1 - w) u*(x_t, t, no class, w = 1),
    and |.|_2 is the norm over an image: the root of the sum of squares. Without their warm-up of the tangent and their
    learned weights of times. Such a network knows jumps to s = 0 alone, see `sampler.sample`.

    Arguments and result as in `loss.tvm_loss`, with a flow term of zero; s and s' of the batch are not used.
    """
    beta, a = beta_of(batch, guidance), factor(batch, scaled)
    x_t, s = path.point(batch.x0, batch.x1, batch.t), torch.zeros_like(batch.t)
    v = guided_velocity(target, batch, x_t, batch.t, guidance, guided)
    F, dF_dt = network(x_t, batch.t, s, batch.labels, beta, (v, torch.ones_like(batch.t), None), True)
    with torch.no_grad():
        g = v - a * F - per_image(batch.t) * a * dF_dt
        goal = a * F + g / per_image(g.flatten(1).norm(dim=1) + TANGENT_EPS)
    loss = mean_square(a * F - goal) / batch.w.square()
    return Terms(loss, loss, torch.zeros_like(loss))
