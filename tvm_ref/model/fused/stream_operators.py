"""The operators `tvm_ref::stream` and `tvm_ref::stream_backward`: the kernels of stream_kernels.py for the dispatcher.

stream.py has their autograd formula. A call without a branch, without a norm or without tangents has None for the
tensors of these, and no results for them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import define

Maybe = Tensor | None

ROWS = 32  # tokens of a program
WARPS = 8
STAGES = 2


def _forward_results(x, x_t, branch, branch_t, gate, gate_t, shift, shift_t, scale, scale_t, eps, dtype):  # type: ignore[no-untyped-def]
    """Unwritten y, y_t, inner, inner_t."""
    y = None if branch is None else _empty(x, x.dtype)
    inner = None if scale is None else _empty(x, dtype)
    return [y, _second(y, x_t), inner, _second(inner, x_t)]


def _forward(results, x, x_t, branch, branch_t, gate, gate_t, shift, shift_t, scale, scale_t, eps, dtype):  # type: ignore[no-untyped-def]
    from .stream_kernels import stream_forward_kernel

    vectors = (gate, gate_t, shift, shift_t, scale, scale_t)
    rows = map(_contiguous, (x, x_t, branch, branch_t))
    _launch(stream_forward_kernel, x, (*rows, *vectors, *results), vectors, eps, branch, scale, x_t)


def _backward_results(x, x_t, branch, branch_t, gate, gate_t, scale, scale_t, dy, dy_t, di, di_t, eps):  # type: ignore[no-untyped-def]
    """Unwritten dx, dx_t, dbranch, dbranch_t, and sums, the gradients of vectors by programs (stream_backward_kernel)."""
    dx = None if scale is None else _empty(dy, dy.dtype)
    db = None if branch is None else _empty(dy, branch.dtype)
    images, tokens, channels = dy.shape
    vectors = ((gate is not None) + 2 * (scale is not None)) * (1 if dy_t is None else 2)
    sums = dy.new_empty(images, _parts(tokens), vectors, channels, dtype=torch.float32)
    return [dx, _second(dx, dy_t), db, _second(db, dy_t), sums]


def _backward(results, x, x_t, branch, branch_t, gate, gate_t, scale, scale_t, dy, dy_t, di, di_t, eps):  # type: ignore[no-untyped-def]
    from .stream_kernels import stream_backward_kernel

    vectors = (gate, gate_t, scale, scale_t)
    rows, gradients = map(_contiguous, (x, x_t, branch, branch_t)), map(_contiguous, (dy, dy_t, di, di_t))
    _launch(stream_backward_kernel, dy, (*rows, *vectors, *gradients, *results), vectors, eps, branch, scale, dy_t)


def _launch(
    kernel: Any, x: Tensor, tensors: Sequence[Maybe], vectors: Sequence[Maybe], eps: float, branch: Maybe, scale: Maybe,
    tangent: Maybe,
) -> None:  # fmt: skip
    """Runs a kernel on tensors, with x in place of those that the call does not have."""
    images, tokens, channels = x.shape
    kernel[(images, _parts(tokens))](
        *(x if tensor is None else tensor for tensor in tensors),
        *(0 if vector is None else vector.stride(0) for vector in vectors),
        tokens,
        channels,
        eps,
        ROWS=ROWS,
        BLOCK=1 << (channels - 1).bit_length(),
        STAGES=STAGES,
        GATED=branch is not None,
        NORMED=scale is not None,
        TANGENT=tangent is not None,
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


_ROWS = "Tensor? x, Tensor? x_t, Tensor? branch, Tensor? branch_t, Tensor? gate, Tensor? gate_t"
stream = define(
    f"stream({_ROWS}, Tensor? shift, Tensor? shift_t, Tensor? scale, Tensor? scale_t, float eps, ScalarType dtype)",
    _forward_results, _forward,
)  # fmt: skip
stream_backward = define(
    f"stream_backward({_ROWS}, Tensor? scale, Tensor? scale_t, Tensor dy, Tensor? dy_t, Tensor? di, Tensor? di_t, "
    "float eps)",
    _backward_results, _backward,
)  # fmt: skip
