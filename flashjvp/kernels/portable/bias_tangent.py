"""Tiles of the tangent of an additive mask, in a kernel; MATH.md (24)."""

import triton
import triton.language as tl

from ..tiles import load_mask


@triton.jit
def load_mask_tangent(mask_t, m0, n0, row, column, M, N, MASK_LAYOUT: tl.constexpr):
    """A tile of the tangent of an additive mask of this layout, in float32."""
    return load_mask(mask_t, m0, n0, row, column, M, N, (MASK_LAYOUT[0], False, True)).to(tl.float32)
