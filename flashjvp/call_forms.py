"""The other forms of a call: PyTorch's names, tensors [B, M, H, D], 0-dim tensors as numbers, head dims of 0."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _torch
from .errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from .operands import Operands

LAYOUTS = ("bhmd", "bmhd")


def by_either_name(q: Any, k: Any, v: Any, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """q, k and v, each by its short name or by PyTorch's. One that came by neither is None, which checks.py refuses."""
    return _once("q", q, "query", query), _once("k", k, "key", key), _once("v", v, "value", value)


def _once(short: str, x: Any, long: str, y: Any) -> Any:
    if x is not None and y is not None:
        raise ArgumentTypeError(f"{long}: expected a tensor as {short} or as {long}, got both")
    return x if y is None else y


def heads_first(layout: object, **tensors: Any) -> tuple[Any, ...]:
    """Views [..., H, M, D] of tensors [..., M, H, D]. What is no strided tensor stays as it is, for checks.py."""
    if not isinstance(layout, str):
        raise ArgumentTypeError(f"layout: expected one of {LAYOUTS}, got an object of type {type(layout).__name__}")
    if layout != "bmhd":
        raise ArgumentValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    return tuple([_heads_first(name, x) for name, x in tensors.items()])


def _heads_first(name: str, x: Any) -> Any:
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        return x
    if x.ndim < 3:
        raise ArgumentValueError(f"{name}: expected at least 3 dims, [..., rows, H, D], got shape {list(x.shape)}")
    return x.transpose(-2, -3)


def number(name: str, x: Any, q: Any) -> Any:
    """The number in a 0-dim tensor, on the CPU or on q's device; what is no tensor stays as it is, for checks.py.

    Reading one on an accelerator waits for the device. A derivative that the number could not carry is refused.
    """
    if not isinstance(x, Tensor):
        return x
    if x.ndim != 0 or x.dtype == torch.bool or x.is_complex() or x.is_quantized:
        came = f"one of dtype {x.dtype} and shape {list(x.shape)}"
        raise ArgumentTypeError(f"{name}: expected a real number, or a 0-dim tensor that holds one, got {came}")
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{name}: expected a number, which has no gradient, got a tensor with requires_grad=True"
        )
    if (not torch.compiler.is_compiling() and _torch.is_wrapped(x)) or _torch.unpack_dual(x)[1] is not None:
        raise UnsupportedError(f"{name}: expected a number, which has no derivative, got a tensor that is transformed")
    if x.device.type == "meta" or (x.device.type != "cpu" and x.device != getattr(q, "device", None)):
        raise ArgumentValueError(f"{name}: expected a tensor on the device of q or on the cpu, got one on {x.device}")
    return x.item()


def with_columns(x: Operands) -> Operands:
    """With a column of zeros where head dims are 0, as operators take them. Scores are 0 with it, too."""
    if x.q.shape[-1] == 0:
        q, k, q_t, k_t = (None if y is None else pad(y, (0, 1)) for y in (x.q, x.k, x.q_t, x.k_t))
        x = x._replace(q=q, k=k, q_t=q_t, k_t=k_t)
    if x.v.shape[-1] == 0:
        x = x._replace(v=pad(x.v, (0, 1)), v_t=None if x.v_t is None else pad(x.v_t, (0, 1)))
    return x
