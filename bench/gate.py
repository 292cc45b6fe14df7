"""The correctness gate: nothing is timed before its results kept verify's error budget on a reduced shape."""

from dataclasses import dataclass, replace

import torch

from verify import oracles, tolerance

from .cases import Case, make_inputs, reduced, require_gradients
from .measure import results
from .providers import Attention


@dataclass(frozen=True)
class Verdict:
    """Relative Frobenius errors of a provider, the worst gradient's for all; `reason` is empty within the budget."""

    err_o: float
    err_o_t: float
    err_grad: float | None
    reason: str


def check(attention: Attention, case: Case, device: torch.device) -> Verdict:
    """Compares the case's outputs and gradients, on the reduced shape, with dense attention in float64."""
    inputs = make_inputs(reduced(replace(case, mode="fwd+bwd")), torch.device("cpu"), seed=1)
    given = inputs.map(lambda x: x.to(device, copy=True))
    if case.backward:
        require_gradients(given)
    found = [x.detach().cpu() for x in results(attention, given, case.backward)]
    names = oracles.NAMES[: len(found)]
    exact = oracles.dense64(inputs)
    budgets = tolerance.budget(inputs, exact, oracles.dense_same_type(inputs))
    checked = {name: budgets[name] for name in names}
    verdicts = tolerance.check(replace(exact, **dict(zip(names, found, strict=True))), exact, checked)
    beyond = [
        f"{verdict.tensor} {verdict.frobenius:.2e} (budget {verdict.frobenius_budget:.2e}), "
        f"worst row {verdict.worst_row:.2e} (budget {verdict.worst_row_budget:.2e})"
        for verdict in verdicts
        if not verdict.ok
    ]
    errors = [verdict.frobenius for verdict in verdicts]
    # max() would pass over a NaN that does not come first
    worst = max(errors[2:], key=lambda error: float("inf") if error != error else error) if case.backward else None
    return Verdict(errors[0], errors[1], worst, "; ".join(beyond))
