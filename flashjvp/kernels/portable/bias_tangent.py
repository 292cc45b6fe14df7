"""Tiles of the tangent of an additive mask, in a kernel; MATH.md (24)."""

import triton
import triton.language as tl


@triton.jit
def load_mask_tangent(mask_t, m0, n0, row, column, M, N, MASK_LAYOUT: tl.constexpr):
    """A tile of the tangent of an additive mask of this layout, in float32."""
    tile = mask_t[0] + tl.cast(m0, tl.int64) * mask_t[1] + n0 * MASK_LAYOUT[0]
    offsets = row.to(tl.int64) * mask_t[1] + column * MASK_LAYOUT[0]  # mutate: offsets
    return tl.load(tile + offsets, mask=(row < M - m0) & (column < N - n0), other=0).to(tl.float32)
