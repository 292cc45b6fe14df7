"""precision="high": half types multiplied as TF32 is, with o and o_t in float32, as a backend that is built on others.

Its name is "high:LOCAL". Where scores are large, what half types lose is lost where P, P_t, dS and dS_t are rounded for
products, and where O and O_t are: the backward pass takes (11) and (12) of them, which nearly cancel against A and B
there. So O and O_t stay float32, and products have operands of 11 significant bits: on Hopper GPUs the warp-specialised
kernels read float16 copies with per-tensor scaling (kernels/hopper/per_tensor_scaling.py), everything else computes
with float32 copies. Gradients are rounded to the type of what they are of, once. Other types are computed as always.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..layout import empty_bias, empty_rows
from ..operands import RECORDS, BackwardOperands, Gradients, Operands, PlainOperands
from . import select

Maybe = Tensor | None
HALF = (torch.float16, torch.bfloat16)
_OF_PLAIN = ("q", "k", "v", "mask")  # what `backward` gives gradients of


def of_tensors(local: str, q: Tensor, v: Tensor) -> Any:
    """What has the four functions of a backend (reference.py) for tensors like q and v."""
    module = select.resolve(None if local == "best" else local, q.device, q.dtype, select.is_wide(q, v))
    if q.dtype not in HALF:
        return module
    return _functions(module, _OfKernels if module.__name__.endswith(".triton") else _InFloat32)


@cache
def _functions(local: ModuleType, made: Callable[..., Any]) -> Any:
    return SimpleNamespace(**{name: made(local, name, record) for name, record in RECORDS.items()})


class _InFloat32:
    """A function of a backend with float32 copies of half tensors."""

    def __init__(self, local: ModuleType, name: str, record: Any) -> None:
        self._local, self._name, self._record = local, name, record

    def __call__(self, *args: Any) -> Any:
        count = len(self._record._fields)
        return in_float32(getattr(self._local, self._name), self._record._make(args[:count]), args[count:])


class _OfKernels:
    """A function of the triton backend, which knows what to do, and can be bound (kernels/launch/replay.py)."""

    def __init__(self, local: ModuleType, name: str, _: Any) -> None:
        self._local, self._name = local, name

    def __call__(self, *args: Any) -> Any:
        return getattr(self._local, self._name)(*args, None, True)

    def bind(self, operands: Any, options: tuple[Any, ...]) -> Any:
        """What takes the tensors alone."""
        return getattr(self._local, self._name).bind(operands, (*options, None, True))


def in_float32(function: Callable[..., Any], operands: Any, rest: tuple[Any, ...]) -> Any:
    """A function of a backend, of float32 copies of the half tensors. Gradients come in the type of what they are of.

    `operands` is a record of the function's tensors, `rest` what it takes besides.
    """
    results = function(*map(_widened, operands), *rest)  # mutate: results
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


select.FAMILIES_BY_TENSORS["high"] = of_tensors
