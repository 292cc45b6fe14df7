"""Derivatives by central differences in float64, with an estimate of how far off they may be."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .findings import Comparison, Verdict

# Steps relative to the size of what is moved, the likeliest first: rounding asks for long ones, curvature and kinks for
# short ones. At each, two shorter steps tell how much the quotient depends on the step.
_STEPS = (1e-4, 1e-5, 1e-6, 1e-3, 1e-2)
_SHORTER = (1.0, 0.5, 0.25)
_GOOD_ENOUGH = 1e-7
# A derivative is wrong if it is further off than both: rounding of float64 in a deep model, and what the differences
# may be off themselves. Known faults (layer norms) are off by 1e-2 and more.
_ROUNDING = 1e-6
_MANY_UNCERTAINTIES = 10.0
_TOO_UNCERTAIN = 1e-3
# A derivative that would change the function by less than this part of it counts as if it were that large.
_NEGLIGIBLE = 1e-6


class Quotient(NamedTuple):
    """A derivative [...] along a direction, how far off each element may be, and the size of the function itself."""

    value: Tensor
    uncertainty: Tensor
    size: float


def central(function: Callable[[float], Tensor]) -> Quotient:
    """d function(h) / dh at 0. The step with the smallest disagreement is taken."""
    best: Quotient | None = None
    size = function(0.0).norm().item()
    for step in _STEPS:
        found = _at(function, step, size)
        if best is None or _spread(found) < _spread(best):
            best = found
        if _spread(best) <= _GOOD_ENOUGH:
            break
    assert best is not None
    return best


def _at(function: Callable[[float], Tensor], step: float, size: float) -> Quotient:
    quotients = torch.stack([(function(h) - function(-h)) / (2 * h) for h in (step * shorter for shorter in _SHORTER)])
    value = (4 * quotients[1] - quotients[0]) / 3  # Richardson: the error of second order cancels
    return Quotient(value, quotients.amax(0) - quotients.amin(0), size)


def _spread(found: Quotient) -> float:
    spread = _relative(found.uncertainty.norm().item(), _size(found))
    return spread if math.isfinite(spread) else math.inf


def _size(found: Quotient) -> float:
    return max(found.value.norm().item(), _NEGLIGIBLE * found.size)


def compare(what: str, given: Tensor, differences: Quotient) -> Comparison:
    """Judges all elements of a derivative together, by the size of the whole."""
    size = _size(differences)
    off = _relative((given - differences.value).norm().item(), size)
    uncertainty = _relative(differences.uncertainty.norm().item(), size)
    return Comparison(what, _verdict(off, uncertainty), off, uncertainty)


def _relative(length: float, size: float) -> float:
    return 0.0 if length == 0 else length / size if size else math.inf


def _verdict(off: float, uncertainty: float) -> Verdict:
    if not math.isfinite(uncertainty):
        return "undecided"
    if not math.isfinite(off) or off > max(_ROUNDING, _MANY_UNCERTAINTIES * uncertainty):
        return "wrong"
    return "right" if uncertainty <= _TOO_UNCERTAIN else "undecided"
