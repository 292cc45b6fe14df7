"""Both sides of the Wasserstein bound of Terminal Velocity Matching, for networks of the eight Gaussians."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.toys import toy_points
from ..model.dit import DiT
from .marginal_velocity import carried_to_data, marginal_velocity
from .metrics import wasserstein2

TIMES = 40  # intervals of [0, 1] over which the integrals are summed
ODE_STEPS = 400


class Bound(NamedTuple):
    """Squared distances in the plane, and bounds of them as decimal logarithms.

    w2: squared 2-Wasserstein distance between one-jump samples and fresh points, which bounds nothing below its own
    value of two fresh sets; endpoint: E |x_1 + f(x_1, 1, 0) - psi|^2, psi where v* carries x_1; integral: of the two
    terms of the loss over [0, 1]; the bounds: see `bound`; lipschitz: the largest L(s) that was found.
    """

    w2: float
    endpoint: float
    integral: float
    log10_groenwall: float
    log10_linear: float
    log10_one_sided: float
    lipschitz: float


def bound(model: DiT, count: int, seed: int) -> Bound:
    """Estimates both sides with `count` samples. Zhou et al., arXiv 2511.19797, Theorem 1, at t = 1, with v* in place
    of the noisy x1 - x0, so that no irreducible variance is left:

        a(s) = E |df/ds(x_1, 1, s) - u(x_1 + f(x_1, 1, s), s)|^2,   b(s) = E |u(x_s, s) - v*(x_s, s)|^2

        endpoint <= 3 int_0^1 exp( int_0^r 3 L(u)^2 (1 - u) du ) ( a(r) + b(r) ) dr             groenwall
        endpoint <= ( int_0^1 exp( int_0^r L(u) du ) ( a(r)^(1/2) + b(r)^(1/2) ) dr )^2         linear
        the same with the one-sided constant M(u) in place of L(u)                                one_sided

    L(s) is the largest spectral norm of du/dx, M(s) the largest eigenvalue of the symmetric part of -du/dx, over the
    samples x_s and x_1 + f. So both are estimates from below: with the true ones the bounds are larger.
    """
    device = next(model.parameters()).device
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = carried_to_data(noise, ODE_STEPS)
    times = torch.linspace(0, 1, TIMES + 1, dtype=torch.float64)
    a, b, lipschitz, one_sided = (torch.zeros(TIMES + 1, dtype=torch.float64) for _ in range(4))
    with torch.no_grad():
        for i, s in enumerate(times.tolist()):
            F, dF_ds = _jump(model, noise.to(device), s)
            reached = noise.to(device) + (s - 1) * F
            a[i] = _square(F + (s - 1) * dF_ds - _velocity(model, reached, s))
            x_s = exact[round((1 - s) * ODE_STEPS)].to(device)
            b[i] = _square(_velocity(model, x_s, s) - marginal_velocity(x_s, s))
            jacobian = _jacobians(model, torch.cat([x_s, reached]), s)
            lipschitz[i] = torch.linalg.matrix_norm(jacobian, ord=2).max()
            one_sided[i] = torch.linalg.eigvalsh(-(jacobian + jacobian.mT) / 2).max()
        samples = noise.to(device) - _jump(model, noise.to(device), 0.0)[0]
    fresh = torch.from_numpy(toy_points("eight_gaussians", count, 5000 + seed))
    roots = a.sqrt() + b.sqrt()
    return Bound(
        w2=wasserstein2(samples.cpu(), fresh.double()) ** 2,
        endpoint=_square(samples.cpu() - exact[-1]),
        integral=float(torch.trapezoid(a + b, times)),
        log10_groenwall=_log_integral(3 * lipschitz.square() * (1 - times), 3 * (a + b), times),
        log10_linear=2 * _log_integral(lipschitz, roots, times),
        log10_one_sided=2 * _log_integral(one_sided, roots, times),
        lipschitz=float(lipschitz.max()),
    )


def _log_integral(rate: Tensor, values: Tensor, times: Tensor) -> float:
    """log10 of int exp( int_0^r rate ) values(r) dr by the trapezoidal rule, without overflow."""
    exponent = torch.cat([rate.new_zeros(1), torch.cumulative_trapezoid(rate, times)])
    most = exponent.max()
    return float((most + torch.trapezoid((exponent - most).exp() * values, times).log()) / math.log(10))


def _jump(model: DiT, x: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """F(x, 1, s) and dF/ds, float64 [n, 2]."""
    ones = torch.ones(len(x), device=x.device)
    F, dF_ds = model(_image(x), ones, s * ones, _labels(x), None, (None, None, ones))
    return _points(F), _points(dF_ds)


def _velocity(model: DiT, x: Tensor, s: float) -> Tensor:
    """u(x, s), float64 [n, 2]."""
    times = torch.full((len(x),), s, device=x.device)
    return _points(model(_image(x), times, times, _labels(x)))


def _jacobians(model: DiT, x: Tensor, s: float) -> Tensor:
    """du/dx, float64 [n, 2, 2], column by column."""
    times = torch.full((len(x),), s, device=x.device)
    columns = []
    for axis in range(2):
        along = torch.zeros_like(x)
        along[:, axis] = 1
        columns.append(_points(model(_image(x), times, times, _labels(x), None, (_image(along), None, None))[1]))
    return torch.stack(columns, dim=-1)


def _image(x: Tensor) -> Tensor:
    return x.float()[:, :, None, None]


def _points(image: Tensor) -> Tensor:
    return image.flatten(1).double()


def _labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _square(x: Tensor) -> float:
    """The mean of |x|^2 over vectors [n, 2]."""
    return float(x.square().sum(1).mean())
