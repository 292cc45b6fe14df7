"""Triton kernels of the RMS norm of q and k over the head dim, from and to the packed projection.

A row is a head of a token: x of D numbers, with the weight w,

    n = x / rms(x)                             o = n w
    n_t = (x_t - n mean(n x_t)) / rms(x)       o_t = n_t w

The projection is [tokens, 3, heads, D] with q, k, v along the second dim; q, k, v and their gradients by themselves are
[tokens, heads, D]. A program takes BLOCK rows. Sums over rows, the gradients of the weights, are left to the caller.
"""

import triton
import triton.language as tl


@triton.jit
def heads_forward_kernel(
    qkv, qkv_t, q_weight, k_weight, q, q_t, k, k_t, rows, H, D, eps,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """Writes q and k, and their tangents (TANGENT)."""
    part = tl.program_id(1)
    if part == 0:
        _normalise(qkv, qkv_t, q_weight, q, q_t, 0, rows, H, D, eps, BLOCK, BLOCK_D, TANGENT)
    else:
        _normalise(qkv, qkv_t, k_weight, k, k_t, 1, rows, H, D, eps, BLOCK, BLOCK_D, TANGENT)


@triton.jit
def _places(part, rows, H, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the rows of a program are in the projection and by themselves, which are inside, and their dims."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dims < D)[None, :]
    packed = (row // H * 3 * H + part * H + row % H)[:, None] * D + dims[None, :]
    return packed, row[:, None] * D + dims[None, :], inside, dims


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _normalise(
    qkv, qkv_t, weight, o, o_t, part, rows, H, D, eps,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    packed, single, inside, dims = _places(part, rows, H, D, BLOCK, BLOCK_D)
    w = _load(weight, dims, dims < D)[None, :]
    x = _load(qkv, packed, inside)
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    n = x * r
    _store(o, single, n * w, inside)
    if TANGENT:
        x_t = _load(qkv_t, packed, inside)
        n_t = (x_t - n * (tl.sum(n * x_t, 1) / D)[:, None]) * r
        _store(o_t, single, n_t * w, inside)


@triton.jit
def heads_backward_kernel(
    qkv, qkv_t, q_weight, k_weight, dq, dq_t, dk, dk_t, dv, dv_t, dqkv, dqkv_t, sums, rows, H, D, eps,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the projection, that of its tangent (TANGENT), and sums.

    sums [2, programs, D] float32: the gradients of the weights of q and k.
    """
    part = tl.program_id(1)
    if part == 0:
        _differentiate(qkv, qkv_t, q_weight, dq, dq_t, dqkv, dqkv_t, sums, 0, rows, H, D, eps, BLOCK, BLOCK_D, TANGENT)
    elif part == 1:
        _differentiate(qkv, qkv_t, k_weight, dk, dk_t, dqkv, dqkv_t, sums, 1, rows, H, D, eps, BLOCK, BLOCK_D, TANGENT)
    else:
        packed, single, inside, _ = _places(2, rows, H, D, BLOCK, BLOCK_D)
        _store(dqkv, packed, _load(dv, single, inside), inside)
        if TANGENT:
            _store(dqkv_t, packed, _load(dv_t, single, inside), inside)


@triton.jit
def _differentiate(
    qkv, qkv_t, weight, do, do_t, dqkv, dqkv_t, sums, part, rows, H, D, eps,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    packed, single, inside, dims = _places(part, rows, H, D, BLOCK, BLOCK_D)
    w = _load(weight, dims, dims < D)[None, :]
    x = _load(qkv, packed, inside)
    d = _load(do, single, inside)
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    n = x * r
    dn = d * w
    of_weight = d * n
    m = (tl.sum(dn * n, 1) / D)[:, None]
    if TANGENT:
        x_t = _load(qkv_t, packed, inside)
        d_t = _load(do_t, single, inside)
        a = (tl.sum(n * x_t, 1) / D)[:, None]
        n_t = (x_t - n * a) * r
        of_weight += d_t * n_t
        dn_t = d_t * w
        s = (tl.sum(dn_t * n, 1) / D)[:, None]
        # What n_t and r add to the gradient of n, and the mean of all of it that is taken away along n.
        m += (tl.sum(dn_t * n_t, 1) / D)[:, None] - 2 * a * s * r
        dn -= (dn_t * a + x_t * s) * r
        _store(dqkv_t, packed, (dn_t - n * s) * r, inside)
    _store(dqkv, packed, (dn - n * m) * r, inside)
    at = (part * tl.num_programs(0) + tl.program_id(0)) * D + dims
    _store(sums, at, tl.sum(of_weight, 0), dims < D)
