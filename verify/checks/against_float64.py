"""The check of every result of a call against dense attention in float64."""

from collections.abc import Callable, Sequence

from ..budget import tolerance
from ..budget.blocks import Block
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Results, Subject, dense64, dense_same_type


def against_float64(
    inputs: Inputs, subject: Subject, dense: Callable[[Inputs], Results] = dense_same_type, blocks: Sequence[Block] = ()
) -> list[Identity]:
    """All results against dense attention: whole tensors, then their worst rows."""
    exact = dense64(inputs)
    budgets = tolerance.budget(inputs, exact, dense(inputs), blocks)
    return [
        Identity(row.tensor, error, budget, row.ok)
        for row in tolerance.check(subject.results(inputs), exact, budgets)
        for error, budget in ((row.frobenius, row.frobenius_budget), (row.worst_row, row.worst_row_budget))
    ]
