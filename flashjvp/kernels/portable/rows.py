"""The rows of a head from a given one on, for kernels of which a head may hold several sequences."""

import triton
import triton.language as tl

from ..tiles import select_head


@triton.jit
def select_rows(x, batch, head, batch_shape, start, REGULAR: tl.constexpr):
    """The rows of one head from row `start` on, likewise."""
    rows = select_head(x, batch, head, batch_shape, REGULAR)
    if len(rows) == 0:
        return ()
    else:
        ptr = rows[0] + tl.cast(start, tl.int64) * rows[1]  # mutate: ptr
        if REGULAR:
            ptr = tl.multiple_of(ptr, 16)
        return (ptr, rows[1])
