"""The one place of error budgets: how far from float64 a correct result may lie.

Two measures of each output and gradient against the exact (float64) one: the relative Frobenius norm of the error, and
the worst row (the norm of a row's error over that row's scale). For each,

    budget = max(2 * error of dense attention in the same type on the same inputs, rounding bound of a streaming kernel)

On ordinary numbers the first term rules. The second is for where a correct streaming kernel must lose more than dense
attention does: results that cancel (keys nearly one-hot or constant, large mu, scores of 1e4), sums in another order,
tensors of a few elements. propagation.py derives it, and bounds for sums over results (identities such as adjointness).

Scales. Frobenius errors are relative to the exact norm, or to the rounding bound where that is larger (then no digit is
determined). With r = norm of all rows' bounds / that scale, the rounding bound of the worst row is r (at least the
Frobenius budget), and a row's scale is its exact norm, or its own bound / r where that is larger: a row that cancels is
measured on the scale on which its roundings act. Where bound and exact value are both zero (rows without a key, keys
that nobody attends to) only exact zeros pass. NaN never passes.

Identities between results of several calls (identities.py) hold exactly for exact results, so by the triangle
inequality their two sides differ by at most the rounding bounds of the results that enter, each times the factor with
which it enters. Their errors are relative to the norm of the larger side, or to the bound where that is larger.

Finite differences. Of a smooth F whose values are rounded by at most r, the central quotient over steps of h is off by

    |D(h) - F'| <= h^2 / 6 |F'''| + r / h

which is least near h = (3 u)^(1/3) = 6.9e-6 (u = 2^-53, F''' and r / u of order one); the power of two next to it makes
x + h t exact where x and t are multiples of 2^-10. D(2 h) - D(h) = h^2 / 2 F''' but for O(h^4) and rounding of at most
3/2 r / h, so |D(h) - F'| <= |D(2 h) - D(h)| / 3 + 3/2 r / h, with r from rounding.py in float64.

gradcheck takes one absolute tolerance for all elements, so there F''' is bounded beforehand. Derivatives of o =
sum P_n v_n in the scores are joint cumulants under P: with s = dS/dx and S_t' = dS_t/dx, the third derivative of o is
kappa4(v, s, s, s), that of o_t = kappa2(v, S_t) + mean(v_t) is kappa5(v, S_t, s, s, s) + 3 kappa4(v, S_t', s, s) +
kappa4(v_t, s, s, s). A cumulant is a sum over partitions into blocks of two or more, weighed by (blocks - 1)!: with R
the ranges, |kappa4| <= (1 + 3) R1 R2 R3 R4 and |kappa5| <= (1 + 10) R1 ... R5. o and o_t are linear in v, v_t and the
tangents. The rounding of the analytic derivative itself is smaller by a factor of h.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases.inputs import Inputs
from ..oracles.attention import NAMES, Forward, Results, dense64, dense_same_type, with_rounded_scores
from .blocks import Block
from .rounding import inner_product_bounds, rounding_bounds

DENSE_FACTOR = 2.0
STEP = 2.0**-17
STEP_GRID = 2.0**-10


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
    dense_frobenius: float
    ratio_to_dense: float
    ok: bool


Budgets = dict[str, Budget]


def budget(inputs: Inputs, exact: Results, dense: Results, blocks: Sequence[Block] = ()) -> Budgets:
    """The budget of every tensor of `exact` (dense64), given what dense attention loses (dense_same_type).

    `blocks`: the calls of a sequence that is divided over processes.
    """
    bounds = rounding_bounds(inputs, blocks)
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
        verdicts.append(Row(name, frobenius, b.frobenius, worst_row, b.worst_row, b.dense_frobenius, ratio, ok))
    return verdicts


def assert_within(inputs: Inputs, results: Results, blocks: Sequence[Block] = ()) -> None:
    """Raises AssertionError with a table of the failing tensors unless every result keeps its budget."""
    exact = dense64(inputs)
    verdicts = check(results, exact, budget(inputs, exact, dense_same_type(inputs), blocks))
    failed = [
        f"{r.tensor}: error {r.frobenius:.3g} (budget {r.frobenius_budget:.3g}), "
        f"worst row {r.worst_row:.3g} (budget {r.worst_row_budget:.3g})"
        for r in verdicts
        if not r.ok
    ]
    assert not failed, "outside the error budget:\n" + "\n".join(failed)


@dataclass(frozen=True)
class Identity:
    """The verdict on an identity in one quantity: the distance of its sides and the budget, both relative.

    `error` and `budget` are None where all that is known is whether it holds; `reason` says what was found if not.
    """

    quantity: str
    error: float | None
    budget: float | None
    ok: bool
    reason: str = ""


def same(quantity: str, x: Tensor | None, y: Tensor | None, bound: float) -> Identity:
    """x and y, the two sides of an identity, differ by at most `bound` in norm."""
    if x is None or y is None or x.shape != y.shape:
        return Identity(quantity, math.inf, 0.0, False, "the two sides have different shapes")
    x, y = x.to(torch.float64), y.to(torch.float64)
    distance = (x - y).norm().item()
    scale = max(bound, x.norm().item(), y.norm().item()) or 1.0  # two zeros without a bound
    return Identity(quantity, distance / scale, bound / scale, distance <= bound)


def same_results(x: Results, y: Results, *calls: Inputs) -> list[Identity]:
    """All tensors of two results are equal but for rounding; `calls` are the inputs that gave them."""
    bounds = [rounding_bounds(inputs) for inputs in calls]
    return [same(name, a, b, sum(bound[name].whole for bound in bounds)) for name, a, b in _pairs(x, y)]


def same_as_rounded_scores(results: Results, inputs: Inputs) -> list[Identity]:
    """The results of a call are those of dense attention with once rounded scores, but for the other roundings.

    These are bounded as those of a call with the rounded scores less their largest: a row that a bias of -1e9 was added
    to may lose no more digits than one without a bias.
    """
    call = with_rounded_scores(inputs)
    exact = call.map(lambda x: x if x.dtype == torch.bool else x.double())
    return same_results(results, dense64(call), call, exact)


def same_bits(x: Results, y: Results) -> list[Identity]:
    """All tensors of two results are equal bit by bit; the error is the fraction of elements that are not."""
    return [_same_bits(name, a, b) for name, a, b in _pairs(x, y)]


def adjoint(quantity: str, forward: Inputs, plain: Inputs, jvp: Tensor, vjp: Tensor) -> Identity:
    """jvp = <o_t, d> of the call `forward` and vjp = sum <x_t, d_x> of the call `plain`, whose cotangent is that d."""
    assert forward.d_o_t is not None
    tangents = {"d_q": forward.q_t, "d_k": forward.k_t, "d_v": forward.v_t}
    present = {name: x_t for name, x_t in tangents.items() if x_t is not None}
    bound = inner_product_bounds(forward, {"o_t": forward.d_o_t})["o_t"]
    return same(quantity, jvp, vjp, bound + sum(inner_product_bounds(plain, present).values()))


def linear(both: tuple[Inputs, Tensor], *terms: tuple[float, Inputs, Tensor]) -> Identity:
    """o_t of the call `both` is the sum of factor * o_t over the terms (factor, call, its o_t)."""
    bound = rounding_bounds(both[0])["o_t"].whole
    bound += sum(abs(factor) * rounding_bounds(inputs)["o_t"].whole for factor, inputs, _ in terms)
    total = torch.stack([factor * o_t.double() for factor, _, o_t in terms]).sum(0)
    return same("o_t", both[1], total, bound)


def finite_difference(
    quantity: str, derivative: Tensor, quotients: tuple[Tensor, Tensor], value_bound: float, derivative_bound: float
) -> Identity:
    """`derivative` is what quotients over STEP and 2 STEP tend to; the bounds are those of its rounding and of theirs,
    in float64."""
    once, twice = quotients
    quotient_bound = (twice - once).norm().item() / 3 + 1.5 * value_bound / STEP
    return same(quantity, derivative, once, quotient_bound + derivative_bound)


def gradcheck(inputs: Inputs) -> dict[str, float]:
    """The arguments eps, atol and rtol of torch.autograd.gradcheck for float64 attention and its JVP at `inputs`."""

    def most(*tensors: Tensor | None) -> float:
        return max((x.abs().max().item() for x in tensors if x is not None), default=0.0)

    c, d = abs(inputs.c), inputs.q.shape[-1]
    values, values_t = 2 * most(inputs.v), 2 * most(inputs.v_t)  # ranges over the keys
    s, s_t = 2 * c * most(inputs.q, inputs.k), 2 * c * most(inputs.q_t, inputs.k_t)
    S_t = 2 * c * d * (most(inputs.q_t) * most(inputs.k) + most(inputs.q) * most(inputs.k_t))
    third = 4 * values * s**3  # of o
    third_t = 11 * values * S_t * s**3 + 3 * 4 * values * s_t * s**2 + 4 * values_t * s**3  # of o_t
    bounds = rounding_bounds(inputs)
    rounding = max(bounds[name].rows.max().item() for name in ("o", "o_t"))
    return {"eps": STEP, "atol": STEP**2 / 6 * max(third, third_t) + rounding / STEP, "rtol": 0.0}


def merged(
    whole: Forward, merge: Forward, call: Inputs, parts: Sequence[tuple[Tensor, Forward, Inputs]]
) -> list[Identity]:
    """`whole` of `call` is `merge`, put together from parts (weight w_i [..., M], result, call) by MATH.md (8).

    An error e_lse_i changes w_i by w_i (e_lse_i - sum w_j e_lse_j). Written around the merged o and mu,
    o_t = sum w_i (o_t_i + (mu_i - mu) (o_i - o)), whose bracket changes by e_o_t_i + (mu_i - mu) e_o_i +
    (o_i - o) e_mu_i. Norms of a row's errors add; rows are independent.
    """
    total = {name: bound.rows.clone() for name, bound in rounding_bounds(call).items()}
    bounds = [{name: bound.rows for name, bound in rounding_bounds(inputs).items()} for _, _, inputs in parts]
    of_lse = torch.stack([w * e["lse"] for (w, _, _), e in zip(parts, bounds, strict=True)]).sum(0)
    total["lse"] += of_lse
    o, o_t, _, mu = (x.double() for x in merge)
    for (w, part, _), e in zip(parts, bounds, strict=True):
        o_i, o_t_i, _, mu_i = (x.double() for x in part)
        shift, apart = mu_i - mu, o_i - o
        bracket = o_t_i + shift[..., None] * apart - o_t
        e_w, gap, distance = e["lse"] + of_lse, shift.abs(), apart.norm(dim=-1)
        total["mu"] += w * (e["mu"] + e_w * gap)
        total["o"] += w * (e["o"] + e_w * distance)
        total["o_t"] += w * (e["o_t"] + gap * e["o"] + e["mu"] * distance + e_w * bracket.norm(dim=-1))
    results = []
    for name in Forward._fields:
        x, y = getattr(whole, name).double(), getattr(merge, name).double()
        no_key = x.isneginf() & y.isneginf()  # lse of a row without a key
        results.append(same(name, x.masked_fill(no_key, 0.0), y.masked_fill(no_key, 0.0), total[name].norm().item()))
    return results


def _pairs(x: Results, y: Results) -> list[tuple[str, Tensor | None, Tensor | None]]:
    pairs = [(name, getattr(x, name), getattr(y, name)) for name in NAMES]
    return [(name, a, b) for name, a, b in pairs if a is not None or b is not None]


def _same_bits(quantity: str, x: Tensor | None, y: Tensor | None) -> Identity:
    if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
        return Identity(quantity, math.inf, 0.0, False, "the two sides have different types or shapes")
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    different = x.contiguous().view(bits) != y.contiguous().view(bits)
    fraction = different.double().mean().item() if x.numel() else 0.0
    return Identity(quantity, fraction, 0.0, fraction == 0)


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
