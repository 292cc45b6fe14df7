"""Nested tensors of layout torch.jagged as packed sequences: their rows, the cumulated lengths, and the way back."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from .operands import Inputs

Maybe = Tensor | None
Lengths = tuple[Any, Any]
NAMES = Inputs._fields


def packed(x: Inputs, cu: Lengths) -> tuple[Inputs, Lengths, Callable[[Tensor], Tensor]]:
    """Rows [total, H, D] and cumulated lengths of nested tensors, and what makes rows of queries nested again. Others
    stay as they are."""
    nested = [isinstance(tensor, Tensor) and tensor.is_nested for tensor in x]
    if not any(nested):
        return x, cu, lambda rows: rows
    for name, tensor, is_nested in zip(NAMES, x, nested, strict=True):
        if tensor is not None and not is_nested:
            came = (
                "a tensor that is not" if isinstance(tensor, Tensor) else f"an object of type {type(tensor).__name__}"
            )
            raise ArgumentTypeError(f"{name}: expected a nested tensor, as {NAMES[nested.index(True)]} is, got {came}")
    for name, lengths in zip(("cu_q", "cu_k"), cu, strict=True):
        if lengths is not None:
            raise ArgumentValueError(f"{name}: expected None with nested tensors, which have their lengths, got some")
    given = [None if tensor is None else _rows_first(name, tensor) for name, tensor in zip(NAMES, x, strict=True)]
    q, k = given[0], given[1]
    assert q is not None and k is not None
    for place, name in enumerate(NAMES):
        _check_lengths(name, given[place], NAMES[place % 3 > 0], (q, k)[place % 3 > 0])
    heads_first = isinstance(x.q.shape[1], int)

    def nested_again(rows: Tensor) -> Tensor:
        result = torch.nested.nested_tensor_from_jagged(rows, q.offsets())
        return result.transpose(1, 2) if heads_first else result

    rows = Inputs._make([None if tensor is None else tensor.values() for tensor in given])
    return rows, (q.offsets(), k.offsets()), nested_again


def _rows_first(name: str, x: Any) -> Any:
    """[B, rows, H, D] of that or of [B, H, rows, D], where only the number of rows varies."""
    if x.layout is not torch.jagged:
        raise UnsupportedError(f"{name}: expected a nested tensor of layout torch.jagged, got one of {x.layout}")
    if x.ndim != 4:
        raise ArgumentValueError(f"{name}: expected 4 dims, [B, rows, H, D] or [B, H, rows, D], got {x.ndim}")
    if x.lengths() is not None:
        raise UnsupportedError(f"{name}: expected a nested tensor without holes, got one with lengths of its own")
    ragged = [dim for dim, size in enumerate(x.shape) if not isinstance(size, int)]
    if ragged not in ([1], [2]):
        raise ArgumentValueError(f"{name}: expected a nested tensor whose dim 1 or 2 varies, got dims {ragged}")
    return x if ragged == [1] else x.transpose(1, 2)


def _check_lengths(name: str, x: Any, other: str, like: Any) -> None:
    """The lengths are those of q or of k. Other numbers of sequences, and of rows in all, are seen without reading."""
    if x is None or x.offsets() is like.offsets():
        return
    sizes: list[Sequence[int]] = [(tensor.offsets().shape[0] - 1, tensor.values().shape[0]) for tensor in (x, like)]
    if sizes[0] != sizes[1] or (x.device.type == "cpu" and not torch.equal(x.offsets(), like.offsets())):
        expected = f"the lengths of {other}, {sizes[1][0]} sequences of {sizes[1][1]} rows in all"
        came = f"{sizes[0][0]} of {sizes[0][1]}, or others"
        raise ArgumentValueError(f"{name}: expected {expected}, got {came}")
