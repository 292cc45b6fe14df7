"""The inline assembly of the warp-specialised kernels, on tensors of the CPU."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .machine import EmulationError


def run(text: str, constraints: str, args: Sequence[Tensor], *rest: object, **options: object) -> Tensor:
    """Of assembly only what the kernels have: selections, products in branches, and numbers as they are."""
    if text == "mov.u32 $0, $1;":
        return args[0]
    if "movmatrix" in text:  # of squares, [warp, half, row, group, column]
        return args[0].transpose(2, 4)
    if "setp.lt.s32 p, $1, $2" in text:
        return torch.where(args[0] < args[1], args[2], args[3])
    if "selp.f32 $0, $1, $2, p" in text:
        return torch.where((args[2] & args[3]) != 0, args[0], args[1])
    if "vote.sync.any.pred p, p, -1" in text:
        return _times_unless_one(text, *args)
    raise EmulationError(f"assembly that is not known here: {text}")


def _times_unless_one(text: str, x: Tensor, factor: Tensor) -> Tensor:
    """Of 64 rows a warp has 16, and a thread two that are 8 apart: it asks for factors by the number of an operand."""
    asked = [int(operand) // 2 % 2 for operand in re.findall(r"setp\S+ p, \$(\d+)", text)]
    other = torch.stack([factor.reshape(4, 2, 8)[:, half] != 1 for half in asked]).any(0).any(1)
    multiplies = other if "@!p bra" in text else ~other
    return torch.where(multiplies.repeat_interleave(16)[:, None], x * factor, x)
