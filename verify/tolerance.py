"""The one place of error budgets: how far from float64 a correct result may lie.

Two measures of each output and gradient against the exact (float64) one: the relative Frobenius norm of the error, and
the worst row (the norm of a row's error over that row's scale). For each,

    budget = max(2 * error of dense attention in the same type on the same inputs, rounding bound of a streaming kernel)

On ordinary numbers the first term rules. The second is for where a correct streaming kernel must lose more than dense
attention does: results that cancel (keys nearly one-hot or constant, large mu, scores of 1e4), sums in another order,
tensors of a few elements. rounding.py derives it, and bounds for sums over results (identities such as adjointness).

Scales. Frobenius errors are relative to the exact norm, or to the rounding bound where that is larger (then no digit is
determined). With r = norm of all rows' bounds / that scale, the rounding bound of the worst row is r (at least the
Frobenius budget), and a row's scale is its exact norm, or its own bound / r where that is larger: a row that cancels is
measured on the scale on which its roundings act. Where bound and exact value are both zero (rows without a key, keys
that nobody attends to) only exact zeros pass. NaN never passes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Inputs
from .oracles import NAMES, Results, dense64, dense_same_type
from .rounding import rounding_bounds

DENSE_FACTOR = 2.0


@dataclass(frozen=True)
class Budget:
    """Budgets of one tensor, both relative, the scales that make errors relative, and what dense attention lost."""

    frobenius: float
    worst_row: float
    scale: float
    row_scale: Tensor
    dense_frobenius: float
    dense_worst_row: float


@dataclass(frozen=True)
class Row:
    """The verdict on one tensor: relative errors, budgets, and the Frobenius error over that of dense attention."""

    tensor: str
    frobenius: float
    frobenius_budget: float
    worst_row: float
    worst_row_budget: float
    ratio_to_dense: float
    ok: bool


Budgets = dict[str, Budget]


def budget(inputs: Inputs, exact: Results, dense: Results) -> Budgets:
    """The budget of every tensor of `exact` (dense64), given what dense attention loses (dense_same_type)."""
    bounds = rounding_bounds(inputs)
    budgets = {}
    for name in NAMES:
        value = getattr(exact, name)
        if value is None:
            continue
        bound, norm, row_norm = bounds[name], value.norm().item(), value.norm(dim=-1)
        scale = max(norm, bound.whole)
        dense_frobenius, _ = _errors(getattr(dense, name), value, scale, row_norm)
        frobenius = max(DENSE_FACTOR * dense_frobenius, bound.whole / scale if scale > 0 else 0.0)
        worst_row = max(frobenius, bound.rows.norm().item() / scale if scale > 0 else 0.0)
        row_scale = torch.maximum(row_norm, bound.rows / worst_row) if worst_row > 0 else row_norm
        _, dense_worst_row = _errors(getattr(dense, name), value, scale, row_scale)
        worst_row = max(DENSE_FACTOR * dense_worst_row, worst_row)
        budgets[name] = Budget(frobenius, worst_row, scale, row_scale, dense_frobenius, dense_worst_row)
    return budgets


def check(results: Results, exact: Results, budgets: Budgets) -> list[Row]:
    """One verdict for each tensor that `exact` has; one that is missing or of another shape fails with error inf."""
    verdicts = []
    for name, b in budgets.items():
        frobenius, worst_row = _errors(getattr(results, name), getattr(exact, name), b.scale, b.row_scale)
        ratio = frobenius / b.dense_frobenius if b.dense_frobenius > 0 else (0.0 if frobenius == 0 else math.inf)
        ok = frobenius <= b.frobenius and worst_row <= b.worst_row
        verdicts.append(Row(name, frobenius, b.frobenius, worst_row, b.worst_row, ratio, ok))
    return verdicts


def assert_within(inputs: Inputs, results: Results) -> None:
    """Raises AssertionError with a table of the failing tensors unless every result keeps its budget."""
    exact = dense64(inputs)
    verdicts = check(results, exact, budget(inputs, exact, dense_same_type(inputs)))
    failed = [
        f"{r.tensor}: error {r.frobenius:.3g} (budget {r.frobenius_budget:.3g}), "
        f"worst row {r.worst_row:.3g} (budget {r.worst_row_budget:.3g})"
        for r in verdicts
        if not r.ok
    ]
    assert not failed, "outside the error budget:\n" + "\n".join(failed)


def _errors(value: Tensor | None, exact: Tensor, scale: float, row_scale: Tensor) -> tuple[float, float]:
    """Frobenius error and worst row of `value`; a zero scale admits only a zero error."""
    if value is None or value.shape != exact.shape:
        return math.inf, math.inf
    if exact.numel() == 0:
        return 0.0, 0.0
    error = value.to(torch.float64) - exact
    whole, rows = error.norm(), error.norm(dim=-1)
    frobenius = (whole / scale).item() if scale > 0 or whole != 0 else 0.0
    worst_row = torch.where((row_scale == 0) & (rows == 0), 0.0, rows / row_scale).amax().item()
    return frobenius if scale > 0 or whole == 0 else math.inf, worst_row
