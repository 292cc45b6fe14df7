"""Triton kernels of GELU in its tanh form, value and tangent in one pass, with the sums that the bias before it gets.

With s = sigmoid(2 u), u = sqrt(2 / pi) (h + 0.044715 h^3), the function h (1 + tanh(u)) / 2 and its derivatives are

    f = h s        f' = s + 2 h s (1 - s) u'        f'' = 4 s (1 - s) (u' + h (u'' / 2 - (2 s - 1) u'^2))

and y = f(h), y_t = f'(h) h_t; so dh = f' dy + f'' h_t dy_t, dh_t = f' dy_t.
"""

import triton
import triton.language as tl


@triton.jit
def _slope(h):
    """s, s (1 - s) without a difference that cancels, u' and f'."""
    u = 0.7978845608028654 * h * (1 + 0.044715 * h * h)
    small = tl.exp(-2 * tl.abs(u))
    share = 1 / (1 + small)
    s = tl.where(u < 0, small * share, share)
    both = small * share * share
    u1 = 0.7978845608028654 * (1 + 0.134145 * h * h)
    return s, both, u1, s + 2 * h * both * u1


@triton.jit
def gelu_forward_kernel(h, h_t, y, y_t, numbers, BLOCK: tl.constexpr, TANGENT: tl.constexpr):
    """Writes y and its tangent (TANGENT). A program takes BLOCK numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    s, _, _, slope = _slope(value)
    tl.store(y + at, (value * s).to(y.dtype.element_ty), mask=inside)
    if TANGENT:
        tangent = tl.load(h_t + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_t + at, (slope * tangent).to(y_t.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    h, h_t, dy, dy_t, dh, dh_t, sums, rows, C,
    ROWS: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    """Writes dh, dh_t (TANGENT), and sums [blocks of rows, C] float32, of dh over the rows of a program.

    A program takes BLOCK channels of ROWS rows, EACH at a time.
    """
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([EACH, BLOCK], tl.float32)
    for first in tl.range(0, ROWS, EACH):
        row = tl.program_id(1).to(tl.int64) * ROWS + first + tl.arange(0, EACH)
        inside = (row < rows)[:, None] & (channels < C)[None, :]
        at = row[:, None] * C + channels[None, :]
        value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        s, both, u1, slope = _slope(value)
        gradient = slope * d
        if TANGENT:
            tangent = tl.load(h_t + at, mask=inside, other=0.0).to(tl.float32)
            d_t = tl.load(dy_t + at, mask=inside, other=0.0).to(tl.float32)
            half_u2 = 0.10703222440890037 * value
            bend = 4 * both * (u1 + value * (half_u2 - (2 * s - 1) * u1 * u1))
            gradient += bend * tangent * d_t
            tl.store(dh_t + at, (slope * d_t).to(dh_t.dtype.element_ty), mask=inside)
        tl.store(dh + at, gradient.to(dh.dtype.element_ty), mask=inside)
        total += gradient
    tl.store(sums + tl.program_id(1) * C + channels, tl.sum(total, 0), mask=channels < C)
