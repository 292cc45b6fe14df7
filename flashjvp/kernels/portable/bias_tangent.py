"""Tiles of the tangent of an additive mask, in a kernel; MATH.md (24)."""

import triton
import triton.language as tl


@triton.jit
def load_mask_tangent(mask_t, m0, n0, row, column, M, N, MASK_LAYOUT: tl.constexpr):
    """A tile of the tangent of an additive mask of this layout, in float32."""
    COLUMN_STRIDE: tl.constexpr = MASK_LAYOUT[0]
    first, row_stride = mask_t
    tile = first + tl.cast(m0, tl.int64) * row_stride + n0 * COLUMN_STRIDE
    offsets = row.to(tl.int64) * row_stride + column * COLUMN_STRIDE  # mutate: offsets
    return tl.load(tile + offsets, mask=(row < M - m0) & (column < N - n0), other=0).to(tl.float32)
