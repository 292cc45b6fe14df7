"""Error budgets of whole networks, where rounding is measured instead of derived.

To first order the error of an evaluation is linear in the unit roundoff of its type, with a factor that depends on the
function and its inputs: so what an independent dense statement of the same formulas loses in one type, against float64,
says what any correct evaluation loses in any other. With e that loss (Frobenius norm of all numbers together, relative
to the exact ones, and at least one rounding of the type), u the unit roundoff of the type in which e was measured and
u' that of the type judged,

    budget = 2 * e * u' / u

where 2 is the project's factor against dense attention in the same type (tolerance.py). If the reference is of the type
judged too (two evaluations in float64 that round differently), both are off, and the budget is twice that.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tolerance import DENSE_FACTOR

SIGNIFICANCE = 1e-9
"""A correct sampler fails a Kolmogorov-Smirnov test of this level on one seed in 1e9; at 20 000 numbers the test sees a
distribution function that is off by 0.023, which is half of what shifting a normal law's mean by 0.12 sigma does."""


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """|results - exact| / |exact|, Frobenius norms over all tensors together; NaN and infinities count as infinite."""
    pairs = list(zip(results, exact, strict=True))
    if any(result.shape != reference.shape for result, reference in pairs):
        return float("inf")
    error = sum((result.double() - reference.double()).square().sum().item() for result, reference in pairs)
    scale = sum(reference.double().square().sum().item() for reference in exact)
    return (error / scale) ** 0.5 if error < float("inf") else float("inf")


def network_budget(
    measured: Sequence[Tensor],
    exact: Sequence[Tensor],
    measured_in: torch.dtype,
    judged_in: torch.dtype,
) -> float:
    """The budget for a `relative_error` against `exact` (float64) of an evaluation that rounds to `judged_in`.

    `measured` is the independent dense evaluation that rounds to `measured_in`: the type judged, or a coarser one.
    """
    roundoff, judged = torch.finfo(measured_in).eps, torch.finfo(judged_in).eps
    loss = max(relative_error(measured, exact), roundoff)
    sides = 2 if judged_in == torch.float64 else 1
    return sides * DENSE_FACTOR * loss * judged / roundoff


def accumulated_rounding(operations: int, dtype: torch.dtype) -> float:
    """The largest relative error of `operations` roundings to the nearest, one upon another: (1 + eps / 2)^n - 1."""
    return math.expm1(operations * math.log1p(torch.finfo(dtype).eps / 2))


def training_budget(dtype: torch.dtype = torch.float64) -> float:
    """How far two correct computations of the same few training steps may be apart, relative: half of the digits.

    They add the same numbers in another order, so they start apart by some eps of `dtype`. A step divides a gradient by
    its own size and so multiplies a relative error by the condition of that gradient; the square root of eps leaves
    room for 1e8 in float64, and is far below the share that one image of a batch, or one process, has in a result.
    """
    return math.sqrt(torch.finfo(dtype).eps)
