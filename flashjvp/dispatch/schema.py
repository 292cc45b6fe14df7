"""The dispatcher operators `flashjvp::{forward, backward, forward_jvp, backward_jvp}`: their names and schemas.

An operator takes the tensors of a record and the options (operands.py); a backward operator also which gradients are
`wanted`. Those that are not come back as empty tensors, because a dispatcher operator cannot return None.
"""

from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..operands import BackwardOperands, Operands, Options, PlainBackwardOperands, PlainOperands

library = torch.library.Library("flashjvp", "DEF")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", float | None: "float?", str | None: "str?"
}  # fmt: skip


class Operator:
    """One operator: the dispatcher's handle for it, and what it takes.

    A backend's function of the same name computes it.
    """

    def __init__(self, name: str, operands: type[Any], is_backward: bool, handle: Any) -> None:
        self.name, self.operands, self.is_backward, self.handle = name, operands, is_backward, handle
        self._tensors = len(operands._fields)
        self._end = self._tensors + len(Options._fields)

    def split(self, args: tuple[Any, ...]) -> tuple[Any, Options, tuple[Any, ...]]:
        """Arguments of the operator as its tensors by name, its options, and what follows: (), or (wanted,)."""
        tensors, end = self._tensors, self._end
        return self.operands._make(args[:tensors]), Options._make(args[tensors:end]), args[end:]


def _define(name: str, operands: type[Any], results: int, is_backward: bool = False) -> Operator:
    hints = {**get_type_hints(operands), **get_type_hints(Options)}
    arguments = [f"{_TYPES[hint]} {argument}" for argument, hint in hints.items()]
    arguments += ["bool[] wanted"] * is_backward
    schema = f"{name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * results)})"
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    return Operator(name, operands, is_backward, getattr(torch.ops.flashjvp, name).default)


FORWARD = _define("forward", PlainOperands, results=2)
BACKWARD = _define("backward", PlainBackwardOperands, results=4, is_backward=True)
FORWARD_JVP = _define("forward_jvp", Operands, results=4)
BACKWARD_JVP = _define("backward_jvp", BackwardOperands, results=8, is_backward=True)
OPERATORS = (FORWARD, BACKWARD, FORWARD_JVP, BACKWARD_JVP)
