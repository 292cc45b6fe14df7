"""Which keys a query sees where that is neither all nor a causal part: a band, or a list of blocks; MATH.md (33).

`seen` is an empty tuple in the dense kernels, where no instruction is made of any of this. For a band, key n is visible
to query m if low <= n - m <= high. For blocks, the list names BLOCK x BLOCK parts of the scores; of a part that is not
visible as a whole a bitmap holds a bit for each score (`plan`, backends/block_plan.py).
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
WORDS = tl.constexpr(4)  # of 32 bits, for each row of a bitmap
IN_BAND = tl.constexpr(3)  # the lengths of `seen` and of `only`
HIDING_BAND = tl.constexpr(2)


@triton.jit
def _in_blocks(position):
    """The number of the block that a row is in, and its place there.

    In the interpreter rows may be Python's integers, which do not take a constexpr as a divisor.
    """
    return position // 128, position % 128


@triton.jit
def _blocks(rows):
    """How many blocks so many rows have."""
    return (rows + 127) // 128


@triton.jit
def band_of_queries(low, high, m0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For queries from m0 on: where the keys that they see start and end, from where on a tile crosses the end, and
    `seen`."""
    start = (tl.maximum(m0 + low, 0) // BLOCK_N) * BLOCK_N  # mutate: start
    end = tl.minimum(N, tl.maximum(m0 + BLOCK_M + high, 0))  # mutate: end
    full = (tl.minimum(N, tl.maximum(m0 + 1 + high, 0)) // BLOCK_N) * BLOCK_N
    return start, end, full, (m0 + BLOCK_M - 1 + low, low, high)


@triton.jit
def band_of_keys(low, high, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For keys from n0 on: where the queries that see them start and end, up to where a tile crosses the start, and
    `seen`."""
    first = (tl.maximum(n0 - high, 0) // BLOCK_M) * BLOCK_M
    last = tl.minimum(M, tl.maximum(n0 + BLOCK_N - low, 0))  # mutate: last
    return first, last, n0 + BLOCK_N - 1 - high, (n0 - low - BLOCK_M + 2, low, high)


@triton.jit
def in_band(band, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile has scores in a band."""
    if len(band) == 0:
        return True
    else:
        low, high = band
        return (n0 <= m0 + BLOCK_M - 1 + high) & (n0 + BLOCK_N - 1 >= m0 + low)


@triton.jit
def _entries(plan, section, batch, head, blocks, number):
    """Of a row or column of blocks: its first entry, and how many rows or keys its entries have."""
    entries = tl.load(plan)
    heads = tl.load(plan + 1)
    place = ((batch % entries) * heads + head % heads) * blocks + number  # mutate: place
    ends = plan + tl.load(plan + section) + place * 2
    first = tl.load(ends)
    return plan + first, (tl.load(ends + 2) - first) // 3 * BLOCK


@triton.jit
def blocks_of_queries(plan, batch, head, m0, M, N, BLOCK_N: tl.constexpr):
    """For queries from m0 on: how far to count through the listed keys, from where on a tile crosses the last key, and
    `seen`."""
    number, in_block = _in_blocks(m0)
    entries, end = _entries(plan, 2, batch, head, _blocks(M), number)
    return end, (N // BLOCK_N) * BLOCK_N, (entries, plan + tl.load(plan + 4), in_block, 0)


@triton.jit
def keys_at(i, full, seen):
    """Step i over keys: the first key of its tile, whether scores may be hidden there, and by what."""
    if len(seen) == 0:
        return i, i >= full, ()
    elif len(seen) == IN_BAND:
        inner, low, high = seen
        return i, (i < inner) | (i >= full), (low, high)  # mutate: return i (1)
    else:
        entries, bits, in_block, _ = seen
        number, place = _in_blocks(i)
        entry = entries + number * 3
        n0 = tl.load(entry) * BLOCK + place
        part = tl.load(entry + 1)
        words = bits + part.to(tl.int64) * (BLOCK * WORDS)
        return n0, (part >= 0) | (n0 >= full), (words, part >= 0, in_block, place)


@triton.jit
def queries_of(first, last, seen, batch, head, M, N):
    """Where the steps over the queries of one head start and end, and what `queries_at` takes."""
    if len(seen) <= IN_BAND:
        return first, last, seen
    else:
        plan, n0, _, _ = seen
        number, in_block = _in_blocks(n0)
        entries, end = _entries(plan, 3, batch, head, _blocks(N), number)
        return 0, end, (entries, plan + tl.load(plan + 4), in_block, 0)


@triton.jit
def queries_at(i, full, seen):
    """Step i over queries: the first query of its tile, whether scores may be hidden there, and by what."""
    if len(seen) == 0:
        return i, i < full, ()
    elif len(seen) == IN_BAND:
        outer, low, high = seen
        return i, (i < full) | (i >= outer), (low, high)  # mutate: return i (2)
    else:
        entries, bits, in_block, _ = seen
        number, place = _in_blocks(i)
        entry = entries + number * 3
        m0 = tl.load(entry) * BLOCK + place
        part = tl.load(entry + 1)
        words = bits + part.to(tl.int64) * (BLOCK * WORDS)
        return m0, part >= 0, (words, part >= 0, place, in_block)


@triton.jit
def hide(s, only, m0, n0, row, column, may_be_hidden):
    """The scores of a tile from query m0 and key n0 on, -inf where `only` hides them. `row` and `column` count from
    there, shaped to broadcast to `s`."""
    if len(only) == HIDING_BAND:
        low, high = only
        if may_be_hidden:
            distance = column - row + (n0 - m0)
            s = tl.where((distance >= low) & (distance <= high), s, float("-inf"))  # mutate: s (1)
    elif len(only) > HIDING_BAND:
        # No branch: products are waited for at one. A block that is visible as a whole has all bits.
        KEYS: tl.constexpr = column.shape[0] * column.shape[1]
        words, is_part, first_row, first_column = only
        first = words + (row + first_row) * WORDS + first_column // 32
        bit = column + first_column % 32
        has_bits = row < is_part.to(tl.int32) * BLOCK  # every row or none: interpreters take no scalar for a mask
        word = tl.load(first, mask=has_bits, other=-1)
        for i in tl.static_range(1, (KEYS + 31) // 32):
            word = tl.where(bit < 32 * i, word, tl.load(first + i, mask=has_bits, other=-1))
        s = tl.where((word >> (bit % 32)) & 1 != 0, s, float("-inf"))  # mutate: s (2)
    return s
