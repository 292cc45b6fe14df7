"""The operators `tvm_ref::heads` and `tvm_ref::heads_backward`: the kernels of heads_kernels.py for the dispatcher.

heads.py has their autograd formula. A call without tangents has None for theirs, and no results for them.
"""

import torch

from .library import define

NUMBERS = 4096  # of a tensor, in a program
WARPS = 4


def _forward_results(qkv, qkv_t, q_weight, k_weight, heads, eps):  # type: ignore[no-untyped-def]
    """Unwritten q, q_t, k, k_t [B, N, heads, D]."""
    images, tokens, width = qkv.shape
    single = [qkv.new_empty(images, tokens, heads, width // 3 // heads) for _ in range(2 if qkv_t is None else 4)]
    return [single[0], None, single[1], None] if qkv_t is None else single


def _forward(results, qkv, qkv_t, q_weight, k_weight, heads, eps):  # type: ignore[no-untyped-def]
    from .heads_kernels import heads_forward_kernel

    _launch(heads_forward_kernel, 2, qkv, qkv_t, (q_weight, k_weight, *results), heads, eps)


def _backward_results(qkv, qkv_t, q_weight, k_weight, dq, dq_t, dk, dk_t, dv, dv_t, heads, eps):  # type: ignore[no-untyped-def]
    """Unwritten dqkv, dqkv_t, and sums, the gradients of the weights by programs (heads_backward_kernel)."""
    dqkv = qkv.new_empty(qkv.shape)
    sums = qkv.new_empty(2, _programs(qkv, heads), q_weight.shape[0], dtype=torch.float32)
    return [dqkv, None if qkv_t is None else torch.empty_like(dqkv), sums]


def _backward(results, qkv, qkv_t, q_weight, k_weight, dq, dq_t, dk, dk_t, dv, dv_t, heads, eps):  # type: ignore[no-untyped-def]
    from .heads_kernels import heads_backward_kernel

    gradients = [None if grad is None else grad.contiguous() for grad in (dq, dq_t, dk, dk_t, dv, dv_t)]
    _launch(heads_backward_kernel, 3, qkv, qkv_t, (q_weight, k_weight, *gradients, *results), heads, eps)


def _programs(qkv, heads):  # type: ignore[no-untyped-def]
    images, tokens, width = qkv.shape
    return -(-images * tokens * heads // _block(width // 3 // heads)[0])


def _block(D: int) -> tuple[int, int]:
    """Rows and dims of a program."""
    dims = 1 << (D - 1).bit_length()
    return max(NUMBERS // dims, 1), dims


def _launch(kernel, parts, qkv, qkv_t, tensors, heads, eps):  # type: ignore[no-untyped-def]
    """Runs a kernel, with qkv in place of tensors that the call does not have."""
    images, tokens, width = qkv.shape
    D = width // 3 // heads
    rows, dims = _block(D)
    given = [qkv if tensor is None else tensor.contiguous() for tensor in (qkv, qkv_t, *tensors)]
    kernel[(_programs(qkv, heads), parts)](
        *given,
        images * tokens * heads,
        heads,
        D,
        eps,
        BLOCK=rows,
        BLOCK_D=dims,
        TANGENT=qkv_t is not None,
        num_warps=WARPS,
    )


_PACKED = "Tensor qkv, Tensor? qkv_t, Tensor q_weight, Tensor k_weight"
heads = define(f"heads({_PACKED}, int heads, float eps)", _forward_results, _forward)
heads_backward = define(
    f"heads_backward({_PACKED}, Tensor dq, Tensor? dq_t, Tensor dk, Tensor? dk_t, Tensor dv, Tensor? dv_t, int heads, "
    "float eps)",
    _backward_results, _backward,
)  # fmt: skip
