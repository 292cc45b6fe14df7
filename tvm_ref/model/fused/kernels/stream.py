"""Triton kernels of the residual stream: gated residual, RMS norm and modulation of a row in one pass.

With the branch b and the vectors of an image (gate g, shift, scale), for value and tangent (MATH of dual.py):

    y = x + g b                        y_t = x_t + g_t b + g b_t                (GATED; otherwise y = x)
    n = y / rms(y)                     n_t = (y_t - n mean(n y_t)) / rms(y)
    inner = n (1 + scale) + shift      inner_t = n_t (1 + scale) + n scale_t + shift_t              (NORMED)

A program takes ROWS successive tokens of an image, one after another, with a row in registers. So it reads the vectors
once, and adds up the gradients of the vectors over its tokens. The sums over programs are left to the caller.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_five(a, b, c, d, e, f, g, h, i, j):
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def stream_forward_kernel(
    x, x_t, branch, branch_t, gate, gate_t, shift, shift_t, scale, scale_t, y, y_t, inner, inner_t,
    gate_stride, gate_t_stride, shift_stride, shift_t_stride, scale_stride, scale_t_stride,
    N, C, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, NORMED: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """Writes y (GATED) and inner (NORMED), and their tangents (TANGENT). Other pointers are not used."""
    image = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    channels = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    inside = channels < C
    if GATED:
        g = _load(gate, image * gate_stride + channels, inside)
        if TANGENT:
            g_t = _load(gate_t, image * gate_t_stride + channels, inside)
    if NORMED:
        offset = _load(shift, image * shift_stride + channels, inside)
        gain = 1 + _load(scale, image * scale_stride + channels, inside)
        if TANGENT:
            offset_t = _load(shift_t, image * shift_t_stride + channels, inside)
            gain_t = _load(scale_t, image * scale_t_stride + channels, inside)
    for token in tl.range(first, tl.minimum(first + ROWS, N), num_stages=STAGES):
        at = (image.to(tl.int64) * N + token) * C + channels
        row = _load(x, at, inside)
        if TANGENT:
            row_t = _load(x_t, at, inside)
        if GATED:
            b = _load(branch, at, inside)
            row += g * b
            _store(y, at, row, inside)
            if TANGENT:
                row_t += g_t * b + g * _load(branch_t, at, inside)
                _store(y_t, at, row_t, inside)
        if NORMED:
            if TANGENT:
                squares, slope = tl.reduce((row * row, row * row_t), 0, _add_two)
                r = tl.rsqrt(squares / C + eps)
                n = row * r
                n_t = (row_t - n * (slope * r / C)) * r
                _store(inner, at, n * gain + offset, inside)
                _store(inner_t, at, n_t * gain + n * gain_t + offset_t, inside)
            else:
                r = tl.rsqrt(tl.sum(row * row, 0) / C + eps)
                _store(inner, at, row * r * gain + offset, inside)


@triton.jit
def _through_norm(row, dn, C, eps):
    """n, and the gradient of the row that comes from dn."""
    squares, along = tl.reduce((row * row, dn * row), 0, _add_two)
    r = tl.rsqrt(squares / C + eps)
    n = row * r
    return n, r * (dn - n * (along * r / C))


@triton.jit
def _through_dual_norm(row, row_t, dn, dn_t, C, eps):
    """n and n_t, and the gradients of the row and of its tangent that come from dn and dn_t."""
    squares, slope, along, along_t, across = tl.reduce(
        (row * row, row * row_t, dn * row, dn_t * row, dn_t * row_t), 0, _add_five
    )
    r = tl.rsqrt(squares / C + eps)
    n = row * r
    a = slope * r / C  # mean(n y_t)
    s = along_t * r / C  # mean(dn_t n)
    # The means of what is taken away along n: dn n - 2 a r s, and dn_t n_t = r (dn_t y_t - a s).
    m = (along + across) * r / C - 3 * a * s * r
    d = r * (dn - (a * r) * dn_t - (s * r) * row_t - n * m)
    return n, (row_t - n * a) * r, d, r * (dn_t - n * s)


@triton.jit
def stream_backward_kernel(
    x, x_t, branch, branch_t, gate, gate_t, scale, scale_t, dy, dy_t, di, di_t, dx, dx_t, db, db_t, sums,
    gate_stride, gate_t_stride, scale_stride, scale_t_stride,
    N, C, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, NORMED: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """Writes dx (NORMED; otherwise it is dy), db (GATED), those of tangents (TANGENT), and sums.

    sums [B, programs of an image, vectors, C] float32: the gradients of shift and scale (NORMED) and of gate (GATED),
    then, in this order, of their tangents (TANGENT).
    """
    image, part = tl.program_id(0), tl.program_id(1)
    channels = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    inside = channels < C
    if GATED:
        g = _load(gate, image * gate_stride + channels, inside)
        sum_g = tl.zeros([BLOCK], tl.float32)
        if TANGENT:
            g_t = _load(gate_t, image * gate_t_stride + channels, inside)
            sum_g_t = tl.zeros([BLOCK], tl.float32)
    if NORMED:
        gain = 1 + _load(scale, image * scale_stride + channels, inside)
        sum_shift = tl.zeros([BLOCK], tl.float32)
        sum_scale = tl.zeros([BLOCK], tl.float32)
        if TANGENT:
            gain_t = _load(scale_t, image * scale_t_stride + channels, inside)
            sum_shift_t = tl.zeros([BLOCK], tl.float32)
            sum_scale_t = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(part * ROWS, tl.minimum((part + 1) * ROWS, N), num_stages=STAGES):
        at = (image.to(tl.int64) * N + token) * C + channels
        d = _load(dy, at, inside)
        if TANGENT:
            d_t = _load(dy_t, at, inside)
        if GATED:
            b = _load(branch, at, inside)
            if TANGENT:
                b_t = _load(branch_t, at, inside)
        if NORMED:
            row = _load(x, at, inside)
            d_inner = _load(di, at, inside)
            if GATED:
                row += g * b
            if TANGENT:
                row_t = _load(x_t, at, inside)
                d_inner_t = _load(di_t, at, inside)
                if GATED:
                    row_t += g_t * b + g * b_t
                dn = d_inner * gain + d_inner_t * gain_t
                dn_t = d_inner_t * gain
                n, n_t, of_norm, of_norm_t = _through_dual_norm(row, row_t, dn, dn_t, C, eps)
                d += of_norm
                d_t += of_norm_t
                sum_shift += d_inner
                sum_scale += d_inner * n + d_inner_t * n_t
                sum_shift_t += d_inner_t
                sum_scale_t += d_inner_t * n
                _store(dx_t, at, d_t, inside)
            else:
                n, of_norm = _through_norm(row, d_inner * gain, C, eps)
                d += of_norm
                sum_shift += d_inner
                sum_scale += d_inner * n
            _store(dx, at, d, inside)
        if GATED:
            sum_g += d * b
            if TANGENT:
                sum_g += d_t * b_t
                sum_g_t += d_t * b
                _store(db, at, d * g + d_t * g_t, inside)
                _store(db_t, at, d_t * g, inside)
            else:
                _store(db, at, d * g, inside)
    KINDS: tl.constexpr = (2 if NORMED else 0) + (1 if GATED else 0)
    at = (image.to(tl.int64) * tl.num_programs(1) + part) * KINDS * (2 if TANGENT else 1) * C + channels
    if NORMED:
        _store(sums, at, sum_shift, inside)
        _store(sums, at + C, sum_scale, inside)
        if TANGENT:
            _store(sums, at + KINDS * C, sum_shift_t, inside)
            _store(sums, at + (KINDS + 1) * C, sum_scale_t, inside)
    if GATED:
        _store(sums, at + (KINDS - 1) * C, sum_g, inside)
        if TANGENT:
            _store(sums, at + (2 * KINDS - 1) * C, sum_g_t, inside)
