"""Which probabilities dropout keeps, in a kernel: Philox 4x32 of the position, as in backends/philox.py; MATH.md (26).

Where a call has no dropout, `seed` is None, `drop` and `kept` are empty tuples, and no instruction is made of any of
this. `seed` is a pointer with (threshold, 1 / (1 - p)) as its numbers, so that one compilation serves every p. DROPOUT
is () or, in a tuple, the number of leading batch dims whose entries have a seed of their own.
"""

import triton
import triton.language as tl

from ..tiles import from_odd


@triton.jit
def select_seed(seed, batch, head, batch_shape, DROPOUT: tl.constexpr):
    """What tells the scores of one head from those of others (seed, head, batch entry among those of the seed), then
    the threshold and 1 / (1 - p)."""
    if seed is None:
        return ()
    else:
        DIMS_OF_SEED: tl.constexpr = DROPOUT[0]
        entries = 1
        for i in tl.static_range(len(batch_shape) - DIMS_OF_SEED):
            entries *= from_odd(batch_shape[i])
        threshold, factor = seed.strides
        return (tl.load(seed.ptr + batch // entries), head, batch % entries, threshold, factor)


@triton.jit
def kept_tile(drop, m0, n0, row, column):
    """Z of (26) for a tile from query m0 and key n0 on, and 1 / (1 - p); `row` and `column` broadcast to the tile."""
    if len(drop) == 0:
        return ()
    else:
        seed, head, entry, threshold, factor = drop
        zero = row * 0 + column * 0
        word, _, _, _ = tl.philox(seed, zero + (column + n0), zero + (row + m0), zero + head, zero + entry)
        return ((word >> 1).to(tl.int32) >= threshold, factor)  # mutate: return word


@triton.jit
def dropped(x, kept):
    """R * x of (26)."""
    if len(kept) == 0:
        return x
    else:
        is_kept, factor = kept
        return tl.where(is_kept, x * factor, 0.0)


@triton.jit
def both_dropped(p, kept):
    """R * P and, where it is there, R * P_t."""
    if len(p) > 1:
        return (dropped(p[0], kept), dropped(p[1], kept))
    else:
        return (dropped(p[0], kept),)
