"""precision="high": half types multiplied as TF32 is, with o and o_t in float32, as a backend that is built on others.

Its name is "high:LOCAL". Where scores are large, what half types lose is lost where P, P_t, dS and dS_t are rounded for
products, and where O and O_t are: the backward pass takes (11) and (12) of them, which nearly cancel against A and B
there. So O and O_t stay float32, and products have operands of 11 significant bits: on Hopper GPUs the warp-specialised
kernels read float16 copies with per-tensor scaling (kernels/hopper/per_tensor_scaling.py), everything else computes
with float32 copies. Gradients are rounded to the type of what they are of, once. Other types are computed as always.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import empty_bias, empty_rows
from ..operands import BackwardOperands, Gradients, Operands, PlainBackwardOperands, PlainOperands
from . import select

Maybe = Tensor | None
HALF = (torch.float16, torch.bfloat16)
_OF_PLAIN = ("q", "k", "v", "mask")  # what `backward` gives gradients of


class High:
    """The four functions of a backend (reference.py)."""

    def __init__(self, local: str) -> None:
        self._local = None if local == "best" else local

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """o and lse."""
        found: tuple[Tensor, Tensor] = self._computed("forward", PlainOperands, args)
        return found

    def forward_jvp(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """o, o_t, lse and mu."""
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self._computed("forward_jvp", Operands, args)
        return found

    def backward(self, *args: Any) -> tuple[Maybe, ...]:
        """The wanted ones of d_q, d_k, d_v, d_mask."""
        found: tuple[Maybe, ...] = self._computed("backward", PlainBackwardOperands, args)
        return found

    def backward_jvp(self, *args: Any) -> tuple[Maybe, ...]:
        """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, d_mask, d_mask_t."""
        found: tuple[Maybe, ...] = self._computed("backward_jvp", BackwardOperands, args)
        return found

    def _computed(self, name: str, record: Any, args: tuple[Any, ...]) -> Any:
        count = len(record._fields)
        operands, rest = record._make(args[:count]), args[count:]
        q, v = operands.q, operands.v
        local = select.resolve(self._local, q.device, q.dtype, select.is_wide(q, v))
        function = getattr(local, name)
        if q.dtype not in HALF:
            return function(*args)
        if local.__name__.endswith(".triton"):
            return function(*args, None, True)
        return in_float32(function, operands, rest)


def in_float32(function: Callable[..., Any], operands: Any, rest: tuple[Any, ...]) -> Any:
    """A function of a backend, of float32 copies of the half tensors. Gradients come in the type of what they are of.

    `operands` is a record of the function's tensors, `rest` what it takes besides.
    """
    results = function(*map(_widened, operands), *rest)
    if isinstance(operands, PlainOperands | Operands):
        return results
    names = Gradients._fields if isinstance(operands, BackwardOperands) else _OF_PLAIN
    return tuple(
        None if grad is None else _empty_gradient(name, getattr(operands, name)).copy_(grad)
        for name, grad in zip(names, results, strict=True)
    )


def _widened(x: Maybe) -> Maybe:
    """In float32, its head and row dims in the order in which results have them."""
    return x if x is None or x.dtype not in HALF else empty_rows(x, x.shape[-1], torch.float32).copy_(x)


def _empty_gradient(name: str, x: Tensor) -> Tensor:
    return empty_bias(x) if name.startswith("mask") else empty_rows(x, x.shape[-1])


select.FAMILIES["high"] = High
