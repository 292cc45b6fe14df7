"""The correctness gate: before it is timed, what a provider returns is judged by verify's budget on a reduced shape."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from verify.budget import tolerance
from verify.cases.inputs import Inputs
from verify.oracles import attention as oracles

from .cases import REDUCED_LENGTH, Case, make_inputs, reduced, require_gradients
from .measure import results
from .providers import APPROXIMATE, Attention, difference_step, stepped

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Verdict:
    """Relative Frobenius errors of a provider, the worst gradient's for all; `reason` is empty within the budget.

    None is what the case does not have.
    """

    err_o: float
    err_o_t: float | None
    err_grad: float | None
    reason: str


@dataclass(frozen=True)
class Reference:
    """Inputs of a reduced case, what dense attention in float64 makes of them, and the budgets."""

    inputs: Inputs
    exact: oracles.Results
    budgets: tolerance.Budgets


def check(attention: Attention, case: Case, device: torch.device, longest: int = REDUCED_LENGTH) -> Verdict:
    """Compares the case's outputs and gradients, on a shape reduced to `longest`, with dense attention in float64."""
    where = CPU if longest == REDUCED_LENGTH else device  # what is longer takes a CPU too long
    reference = _reference(gated(case, longest), where)
    given = reference.inputs.map(lambda x: x.to(device, copy=True))
    if case.backward:
        require_gradients(given)
    found = [x.detach().to(where) for x in results(attention, given, case.backward)]
    names = _names(case)
    exact, budgets = reference.exact, reference.budgets
    checked = {name: budgets[name] for name in names}
    verdicts = tolerance.check(replace(exact, **dict(zip(names, found, strict=True))), exact, checked)
    errors = {verdict.tensor: verdict.frobenius for verdict in verdicts}
    beyond = [
        f"{verdict.tensor} {verdict.frobenius:.2e} (budget {verdict.frobenius_budget:.2e}), "
        f"worst row {verdict.worst_row:.2e} (budget {verdict.worst_row_budget:.2e})"
        for verdict in verdicts
        if not verdict.ok and (case.mode not in APPROXIMATE or verdict.tensor == "o")
    ]
    if case.mode in APPROXIMATE:
        quotient = _difference_quotient(reference, found[1])
        if not quotient.ok:
            beyond.append(f"difference quotient {quotient.error:.2e} (budget {quotient.budget:.2e})")
    # max() would pass over a NaN that does not come first
    gradients = [error for name, error in errors.items() if name.startswith("d_")]
    worst = max(gradients, key=lambda error: float("inf") if error != error else error, default=None)
    return Verdict(errors["o"], errors.get("o_t"), worst, "; ".join(beyond))


def gated(case: Case, longest: int = REDUCED_LENGTH) -> Case:
    """The case that decides whether `case` may be timed: reduced, with every output and gradient."""
    return reduced(replace(case, mode="plain-fwd+bwd" if case.plain else "fwd+bwd"), longest)


def _names(case: Case) -> list[str]:
    """The tensors that `results` returns, in its order."""
    outputs, tangents = (["o"], "") if case.plain else (["o", "o_t"], case.tangents)
    gradients = [f"d_{x}" for x in "qkv"] + [f"d_{x}_t" for x in "qkv" if x in tangents]
    return outputs + (gradients if case.backward else [])


@lru_cache(maxsize=8)
def _reference(case: Case, device: torch.device) -> Reference:
    inputs = make_inputs(case, CPU, seed=1).map(lambda x: x.to(device))
    exact = oracles.dense64(inputs)
    return Reference(inputs, exact, tolerance.budget(inputs, exact, oracles.dense_same_type(inputs)))


def _difference_quotient(reference: Reference, found: Tensor) -> tolerance.Identity:
    """`found` is (o(x + h x_t) - o(x)) / h of exact attention, but for the errors of both o and of the last rounding.

    How far the exact quotient is from o_t is what the method loses, and the row shows it as the error of o_t.
    """
    inputs, exact, budget = reference.inputs, reference.exact, reference.budgets["o"]
    h = difference_step(inputs.q.dtype)
    q, k, v = stepped(inputs, h)
    moved_inputs = replace(inputs, q=q, k=k, v=v)
    moved = oracles.dense64(moved_inputs)
    moved_budget = tolerance.budget(moved_inputs, moved, oracles.dense_same_type(moved_inputs))["o"]
    quotient = (moved.o - exact.o) / h
    rounding = budget.frobenius * budget.scale + moved_budget.frobenius * moved_budget.scale
    last = torch.finfo(found.dtype).eps * quotient.norm().item()
    return tolerance.same("o_t", found, quotient, rounding / h + last)
