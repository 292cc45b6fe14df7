"""Every error about the arguments of a call, raised before anything is launched.

Each message reads `argument: expected ..., got ...`. The checks look at Python types, dtypes, devices and shapes, never
at the contents of a tensor: no synchronisation, and torch.compile traces them. Messages are built on failure only.
"""

import math
import numbers
import sys
from typing import Any

import torch
from torch import Tensor

from . import hints
from .backends import select
from .errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from .operands import Operands

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REAL: Any = (float, int, torch.SymFloat, torch.SymInt, numbers.Real)  # the frequent ones first

_LARGEST = sys.float_info.max  # which an int or a fraction may exceed

# What types of tensors have as __torch_function__ that do nothing there.
_PLAIN_FUNCTIONS = (getattr(Tensor.__torch_function__, "__func__", None), torch.nn.Parameter.__torch_function__)

PRIMALS = ("q", "k", "v")
INPUTS = (*PRIMALS, "q_t", "k_t", "v_t")
TENSORS = (*INPUTS, "attn_mask", "attn_mask_t")
"""The arguments that are tensors, in the order of `Operands`, whose `seed` is none."""

Maybe = Tensor | None
Shape = tuple[int, ...]


def options(dropout_p: Any, is_causal: object, scale: Any, enable_gqa: object) -> None:
    """The arguments that are not tensors, but for `backend`, which is judged with dtype and device."""
    if not isinstance(dropout_p, REAL):
        raise ArgumentTypeError(_message("dropout_p", "a real number", _type(dropout_p)))
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentValueError(_message("dropout_p", "a probability in [0, 1]", _number(dropout_p)))
    if not isinstance(is_causal, bool):
        raise ArgumentTypeError(
            _message("is_causal", "a bool", _type(is_causal) + hints.of_flag("is_causal", is_causal))
        )
    if not isinstance(enable_gqa, bool):
        came = _type(enable_gqa) + hints.of_flag("enable_gqa", enable_gqa)
        raise ArgumentTypeError(_message("enable_gqa", "a bool", came))
    if scale is not None:
        if not isinstance(scale, REAL) or isinstance(scale, bool):
            raise ArgumentTypeError(_message("scale", "a real number or None", _type(scale)))
        if not -_LARGEST <= scale <= _LARGEST:
            raise ArgumentValueError(_message("scale", "a finite number", _number(scale)))


def tensors(x: Operands) -> None:
    """Every argument is a tensor in plain strided memory; tangents and mask may be None."""
    for name, tensor in zip(TENSORS, x, strict=False):
        if tensor is not None or name in PRIMALS:
            _tensor(name, tensor)


def dtypes_and_devices(x: Operands, backend: object) -> None:
    """One dtype that attention takes and one device, which an explicit backend can serve, and a mask that fits them."""
    dtype, device = x.q.dtype, x.q.device
    if dtype not in DTYPES:
        raise ArgumentTypeError(_message("q", "a dtype of " + ", ".join(map(str, DTYPES)), str(dtype)))
    for name, tensor in zip(INPUTS, x, strict=False):
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            came = str(tensor.dtype) + hints.of_tangent(name, tensor, x.q, x.k)
            raise ArgumentTypeError(_message(name, f"the dtype of q, {dtype}", came))
        if tensor.device != device:
            raise ArgumentValueError(_message(name, f"the device of q, {device}", str(tensor.device)))
    if x.mask is not None:
        _mask(x.mask, dtype, device)
    if x.mask_t is not None:
        _mask_tangent(x.mask_t, x.mask)
    if backend is not None:
        select.check(backend, device, dtype)


def ranks_and_tangents(x: Operands) -> None:
    """q, k and v have two dims or more, and a tangent the shape of its primal."""
    for name, primal, tangent in (("q", x.q, x.q_t), ("k", x.k, x.k_t), ("v", x.v, x.v_t)):
        if primal.ndim < 2:
            expected = "at least 2 dims, [rows, D] or [..., H, rows, D]"
            raise ArgumentValueError(_message(name, expected, _shape(primal.shape)))
        if tangent is not None and tangent.shape != primal.shape:
            expected = f"the shape of {name}, {_sizes(primal.shape)}"
            came = _shape(tangent.shape) + hints.of_tangent(f"{name}_t", tangent, x.q, x.k)
            raise ArgumentValueError(_message(f"{name}_t", expected, came))


def head_dims(x: Operands, backend: str | None) -> None:
    """An explicit backend can serve head dims so wide."""
    if backend is not None:
        select.check_head_dims(backend, select.is_wide(x.q, x.v))


def shapes(x: Operands, enable_gqa: bool) -> tuple[Shape, Shape] | None:
    """q [*batch, Hq, M, D], k [*batch, Hkv, N, D], v [*batch, Hkv, N, Dv], or rank 2, all of one rank.

    Returns [*batch, Hq] and [*batch, Hkv] after broadcasting, or None where all the dims before the last two agree.
    """
    q, k, v = x.q.shape, x.k.shape, x.v.shape
    _rows_and_widths(q, k, v)
    if q[:-2] == k[:-2] == v[:-2]:
        return None
    return _leading_dims(q, k, v, enable_gqa)


def mask_shape(shape: Shape, scores: Shape) -> None:
    """`shape` broadcasts, aligned at the right, to the shape [*batch, Hq, M, N] of the scores."""
    missing = len(scores) - len(shape)
    fits = missing >= 0
    for size, full in zip(shape, scores[max(missing, 0) :], strict=False):
        fits = fits and (size == full or size == 1)
    if not fits:
        came = _shape(shape) + hints.of_mask_shape(tuple(shape), tuple(scores))
        raise ArgumentValueError(_message("attn_mask", f"a shape that broadcasts to {_sizes(scores)}", came))


def _tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(_message(name, "a tensor", _type(x) + hints.of_type(x)))
    if type(x) is not Tensor:
        _subclass(name, x)
    if x.layout is not torch.strided or x.is_nested:
        came = f"a {'nested ' if x.is_nested else ''}tensor of layout {x.layout}" + hints.of_layout(x.layout)
        raise UnsupportedError(_message(name, "a tensor of layout torch.strided, not nested", came))


def _subclass(name: str, x: Tensor) -> None:
    """Of the subclasses of Tensor, those that mean what their memory holds, or that the dispatcher asks what to do."""
    kind = type(x)
    if kind.__module__.startswith("torch.distributed.tensor"):
        expected = "a local tensor (x.to_local(); flashjvp.distributed.attention takes DTensors)"
        raise UnsupportedError(_message(name, expected, "a DTensor"))
    is_wrapper = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    has_own_functions = getattr(kind.__torch_function__, "__func__", kind.__torch_function__) not in _PLAIN_FUNCTIONS
    if kind.__module__.startswith("torch.masked") or (name == "attn_mask" and has_own_functions and not is_wrapper):
        expected = "a torch.Tensor" + (" or a causal bias of torch.nn.attention.bias" if name == "attn_mask" else "")
        raise ArgumentTypeError(_message(name, expected, f"a {kind.__name__}, whose memory means something else"))


def _mask(attn_mask: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if attn_mask.dtype not in (torch.bool, torch.float32, dtype):
        expected = f"torch.bool, torch.float32 or the dtype of q, {dtype}"
        came = f"{attn_mask.dtype}{hints.of_mask_dtype(attn_mask.dtype)}"
        raise ArgumentTypeError(_message("attn_mask", expected, came))
    if attn_mask.device != device:
        raise ArgumentValueError(_message("attn_mask", f"the device of q, {device}", str(attn_mask.device)))


def _mask_tangent(attn_mask_t: Tensor, attn_mask: Tensor | None) -> None:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        came = "one beside " + ("no mask" if attn_mask is None else "a boolean mask")
        raise ArgumentValueError(_message("attn_mask_t", "a tangent of a float attn_mask", came))
    if attn_mask_t.dtype is not attn_mask.dtype:
        expected = f"the dtype of attn_mask, {attn_mask.dtype}"
        raise ArgumentTypeError(_message("attn_mask_t", expected, str(attn_mask_t.dtype)))
    if attn_mask_t.device != attn_mask.device:
        expected = f"the device of attn_mask, {attn_mask.device}"
        raise ArgumentValueError(_message("attn_mask_t", expected, str(attn_mask_t.device)))
    if attn_mask_t.shape != attn_mask.shape:
        expected = f"the shape of attn_mask, {_sizes(attn_mask.shape)}"
        raise ArgumentValueError(_message("attn_mask_t", expected, _shape(attn_mask_t.shape)))


def _rows_and_widths(q: Shape, k: Shape, v: Shape) -> None:
    """Shapes of equal length that end in [M, D], [N, D], [N, Dv]. Any of these may be 0."""
    if k[-1] != q[-1]:
        raise ArgumentValueError(_message("k", f"the head dim of q {_sizes(q)}, {q[-1]}", _shape(k)))
    if v[-2] != k[-2]:
        raise ArgumentValueError(_message("v", f"as many rows as k {_sizes(k)}, {k[-2]}", _shape(v)))


def _leading_dims(q: Shape, k: Shape, v: Shape, enable_gqa: bool) -> tuple[Shape, Shape]:
    """[*batch, Hq] and [*batch, Hkv] that shapes of equal length >= 3 broadcast to."""
    batch = _broadcast(q[:-3], k[:-3])
    if batch is None:
        raise ArgumentValueError(_message("k", f"batch dims that broadcast with q {_sizes(q)}", _shape(k)))
    kv_batch = batch
    batch = _broadcast(batch, v[:-3])
    if batch is None:
        expected = f"batch dims that broadcast with those of q and k, {_sizes(kv_batch)}"
        raise ArgumentValueError(_message("v", expected, _shape(v)))
    heads, kv_heads = (_grouped_heads if enable_gqa else _broadcast_heads)(q, k, v)
    return (*batch, heads), (*batch, kv_heads)


def _grouped_heads(q: Shape, k: Shape, v: Shape) -> tuple[int, int]:
    """Numbers that divide that of q. Of k and v with unequal ones, the heads are repeated to a common multiple."""
    heads = q[-3]
    for name, shape in (("k", k), ("v", v)):
        if heads != shape[-3] and (shape[-3] == 0 or heads % shape[-3] != 0):
            expected = f"a number of heads that divides the {heads} heads of q {_sizes(q)}"
            raise ArgumentValueError(_message(name, expected, _shape(shape) + hints.of_heads(q, k, v)))
    return heads, k[-3] if k[-3] == v[-3] else math.lcm(k[-3], v[-3])


def _broadcast_heads(q: Shape, k: Shape, v: Shape) -> tuple[int, int]:
    """Equal numbers, or 1. One key head for several query heads stays one: backends share it without expansion."""
    kv_heads = _broadcast(k[-3:-2], v[-3:-2])
    if kv_heads is None:
        came = _shape(v) + hints.of_heads(q, k, v)
        raise ArgumentValueError(_message("v", f"1 head or as many as k {_sizes(k)}, {k[-3]}", came))
    heads = _broadcast(q[-3:-2], kv_heads)
    if heads is None:
        name, shape = ("k", k) if k[-3] != 1 else ("v", v)
        expected = f"1 head or as many as q {_sizes(q)}, {q[-3]} (or a divisor of it with enable_gqa=True)"
        raise ArgumentValueError(_message(name, expected, _shape(shape) + hints.of_heads(q, k, v)))
    return heads[0], kv_heads[0]


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    """The shape that two shapes of equal length broadcast to; None if they do not."""
    sizes = []
    for x, y in zip(a, b, strict=True):
        if x != y and x != 1 and y != 1:
            return None
        sizes.append(y if x == 1 else x)
    return tuple(sizes)


def _message(argument: str, expected: str, came: str) -> str:
    return f"{argument}: expected {expected}, got {came}"


def _number(x: Any) -> str:
    """Python writes no int of more than 4300 digits."""
    return repr(x) if isinstance(x, float) or abs(x) <= _LARGEST else "one that float64 cannot hold"


def _type(x: object) -> str:
    kind = type(x)  # numpy has a bool of its own
    return f"an object of type {'numpy.' * (kind.__module__ == 'numpy')}{kind.__name__}"


def _shape(shape: Shape) -> str:
    return f"shape {_sizes(shape)}"


def _sizes(shape: Shape) -> str:
    return str(list(shape))
