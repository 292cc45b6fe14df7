"""The operators `tvm_ref::stream` and `tvm_ref::stream_backward`: the kernels of kernels/stream.py for the dispatcher.

A call without a branch, without a norm or without tangents has None for the tensors of these, and no results for them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import Maybe, define

ROWS = 32  # tokens of a program
WARPS = 8
STAGES = 3


class Forward(NamedTuple):
    """x and branch [B, N, C]; gate, shift and scale [B, 1, C]; dtype is that of the normalised rows."""

    x: Tensor
    x_t: Maybe
    branch: Maybe
    branch_t: Maybe
    gate: Maybe
    gate_t: Maybe
    shift: Maybe
    shift_t: Maybe
    scale: Maybe
    scale_t: Maybe
    eps: float
    dtype: torch.dtype


class Backward(NamedTuple):
    """The same, x only with a norm, and the gradients of y and of the normalised rows (inner)."""

    x: Maybe
    x_t: Maybe
    branch: Maybe
    branch_t: Maybe
    gate: Maybe
    gate_t: Maybe
    scale: Maybe
    scale_t: Maybe
    dy: Tensor
    dy_t: Maybe
    di: Maybe
    di_t: Maybe
    eps: float


def _forward_results(given: Forward) -> list[Maybe]:
    """y, y_t, inner, inner_t."""
    y = None if given.branch is None else _empty(given.x, given.x.dtype)
    inner = None if given.scale is None else _empty(given.x, given.dtype)
    return [y, _second(y, given.x_t), inner, _second(inner, given.x_t)]


def _forward(given: Forward, results: list[Maybe]) -> None:
    from .kernels.stream import stream_forward_kernel

    rows, vectors = map(_contiguous, given[:4]), given[4:10]
    _launch(stream_forward_kernel, given, given.x, given.x_t, (*rows, *vectors, *results), vectors)


def _backward_results(given: Backward) -> list[Maybe]:
    """dx, dx_t, dbranch, dbranch_t, and sums, the gradients of vectors by programs (stream_backward_kernel)."""
    dx = None if given.scale is None else _empty(given.dy, given.dy.dtype)
    db = None if given.branch is None else _empty(given.dy, given.branch.dtype)
    images, tokens, channels = given.dy.shape
    vectors = ((given.gate is not None) + 2 * (given.scale is not None)) * (1 if given.dy_t is None else 2)
    sums = given.dy.new_empty(images, _parts(tokens), vectors, channels, dtype=torch.float32)
    return [dx, _second(dx, given.dy_t), db, _second(db, given.dy_t), sums]


def _backward(given: Backward, results: list[Maybe]) -> None:
    from .kernels.stream import stream_backward_kernel

    rows, vectors, gradients = map(_contiguous, given[:4]), given[4:8], map(_contiguous, given[8:12])
    tensors = (*rows, *vectors, *gradients, *results)
    _launch(stream_backward_kernel, given, given.dy, given.dy_t, tensors, vectors)


def _launch(
    kernel: Any, given: Forward | Backward, x: Tensor, x_t: Maybe, tensors: Sequence[Maybe], vectors: Sequence[Maybe]
) -> None:
    """Runs a kernel on tensors, with x in place of those that the call does not have."""
    images, tokens, channels = x.shape
    kernel[(images, _parts(tokens))](
        *(x if tensor is None else tensor for tensor in tensors),
        *(0 if vector is None else vector.stride(0) for vector in vectors),
        tokens,
        channels,
        given.eps,
        ROWS=ROWS,
        BLOCK=1 << (channels - 1).bit_length(),
        STAGES=STAGES,
        GATED=given.branch is not None,
        NORMED=given.scale is not None,
        TANGENT=x_t is not None,
        num_warps=WARPS,
    )


def _parts(tokens: int) -> int:
    """How many programs share the tokens of an image."""
    return -(-tokens // ROWS)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape, dtype=dtype)


def _second(value: Maybe, tangent: Maybe) -> Maybe:
    """A tensor like `value` for its tangent, where there are tangents."""
    return None if value is None or tangent is None else torch.empty_like(value)


def _contiguous(x: Maybe) -> Maybe:
    return None if x is None else x.contiguous()


stream = define("stream", Forward, _forward_results, _forward)
stream_backward = define("stream_backward", Backward, _backward_results, _backward)
