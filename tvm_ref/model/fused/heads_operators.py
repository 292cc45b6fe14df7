"""The operators `tvm_ref::heads` and `tvm_ref::heads_backward`: the kernels of kernels/heads.py for the dispatcher.

A call without tangents has None for theirs, and no results for them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import Maybe, define

NUMBERS = 2048  # of a tensor, in a program
WARPS = 2


class Forward(NamedTuple):
    """qkv [B, N, 3 width], the weights [head_dim], and how many heads there are."""

    qkv: Tensor
    qkv_t: Maybe
    q_weight: Tensor
    k_weight: Tensor
    heads: int
    eps: float


class Backward(NamedTuple):
    """The same, and the gradients of q, k and v [B, N, heads, head_dim]."""

    qkv: Tensor
    qkv_t: Maybe
    q_weight: Tensor
    k_weight: Tensor
    dq: Tensor
    dq_t: Maybe
    dk: Tensor
    dk_t: Maybe
    dv: Tensor
    dv_t: Maybe
    heads: int
    eps: float


def _forward_results(given: Forward) -> list[Maybe]:
    """q, q_t, k, k_t [B, N, heads, head_dim]."""
    q, k = (given.qkv.new_empty(*given.qkv.shape[:2], given.heads, _dims(given)) for _ in range(2))
    return [q, None, k, None] if given.qkv_t is None else [q, torch.empty_like(q), k, torch.empty_like(k)]


def _forward(given: Forward, results: list[Maybe]) -> None:
    from .kernels.heads import heads_forward_kernel

    _launch(heads_forward_kernel, 2, given, (*given[:4], *results))


def _backward_results(given: Backward) -> list[Maybe]:
    """dqkv, dqkv_t, and sums, the gradients of the weights by programs (heads_backward_kernel)."""
    dqkv = given.qkv.new_empty(given.qkv.shape)
    sums = given.qkv.new_empty(2, _programs(given), _dims(given), dtype=torch.float32)
    return [dqkv, None if given.qkv_t is None else torch.empty_like(dqkv), sums]


def _backward(given: Backward, results: list[Maybe]) -> None:
    from .kernels.heads import heads_backward_kernel

    _launch(heads_backward_kernel, 3, given, (*given[:10], *results))


def _launch(kernel: Any, parts: int, given: Forward | Backward, tensors: Sequence[Maybe]) -> None:
    """Runs a kernel on some of q, k and v, with qkv in place of tensors that the call does not have."""
    rows, dims = _block(given)
    kernel[(_programs(given), parts)](
        *((given.qkv if tensor is None else tensor).contiguous() for tensor in tensors),
        _rows(given),
        given.heads,
        _dims(given),
        given.eps,
        BLOCK=rows,
        BLOCK_D=dims,
        TANGENT=given.qkv_t is not None,
        num_warps=WARPS,
    )


def _rows(given: Forward | Backward) -> int:
    return given.qkv.shape[0] * given.qkv.shape[1] * given.heads


def _dims(given: Forward | Backward) -> int:
    return given.qkv.shape[2] // 3 // given.heads


def _block(given: Forward | Backward) -> tuple[int, int]:
    """Rows and dims of a program."""
    dims = 1 << (_dims(given) - 1).bit_length()
    return max(NUMBERS // dims, 1), dims


def _programs(given: Forward | Backward) -> int:
    return -(-_rows(given) // _block(given)[0])


heads = define("heads", Forward, _forward_results, _forward)
heads_backward = define("heads_backward", Backward, _backward_results, _backward)
