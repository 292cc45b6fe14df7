"""precision="high": bfloat16 is as exact as float16 is by default, but that its gradients are rounded once more.

Gradients of single keys are not judged: those of keys that next to no query sees may lie below what float16 copies with
per-tensor scaling can hold, whose scales the other keys set.
"""

import torch

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import QUERY_SIDE, Subject, dense64, dense_same_type, run

HALF = (torch.float16, torch.bfloat16)
OUTPUTS = ("o", "o_t")


def more_precise(inputs: Inputs, subject: Subject) -> list[Identity]:
    """All results against the budgets of float16 calls; of a gradient, and the rounding of its type.

    Inputs of other types are rounded: to bfloat16, or to float16 for kernels on a CPU, which get bfloat16 wrong.
    """
    half = torch.float16 if subject.backend == "triton" and inputs.q.device.type == "cpu" else torch.bfloat16
    if inputs.q.dtype not in HALF:
        inputs = inputs.map(lambda x: x.to(half) if x.is_floating_point() else x)
    as_float16 = inputs.map(lambda x: x.to(torch.float16) if x.dtype in HALF else x)
    exact = dense64(inputs)
    budgets = tolerance.budget(as_float16, exact, dense_same_type(as_float16))
    results = run(inputs, subject.backend, precision="high")
    rounding = torch.finfo(inputs.q.dtype).eps / 2
    found = [
        Identity(f"type of {name}", None, None, x.dtype == torch.float32)
        for name in OUTPUTS
        if (x := getattr(results, name)) is not None
    ]
    for row in tolerance.check(results, exact, budgets):
        more = 0.0 if row.tensor in OUTPUTS else rounding
        pairs = ((row.frobenius, row.frobenius_budget), (row.worst_row, row.worst_row_budget))
        for error, budget in pairs if row.tensor in QUERY_SIDE else pairs[:1]:
            found.append(Identity(row.tensor, error, budget + more, error <= budget + more))
    return found
