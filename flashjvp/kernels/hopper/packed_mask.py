"""Packs boolean masks for the warp-specialised kernels, one bit for each query and key, and applies them to tiles.

A word has 32 bits. Words lie along the rows of a tile, so that a warp reads neighbours: `by_keys` [head, block of 128
keys, quarter, query] for tiles [queries, keys], and `by_queries` [head, block of 128 queries, quarter, key] for tiles
[keys, queries], where keys go on to a multiple of 128. A quarter is what one thread holds of a row of an accumulator:
two of every 8 columns. Keys beyond the end have the bit 0. A mask that is broadcast is packed once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launch.call import Call, Maybe
from ..tiles import from_odd, load_mask, odd, select_head
from .blocks import CONSUMER_ROWS
from .eligibility import BLOCK, is_boolean

# $1 where the word $3 has the bit $4, else $2. LLVM makes vectors of such tests beside a chain of maxima, at 1.7
# times the instructions; from this ptxas moves seven bits of a byte to predicates at once.
SELECT = gl.constexpr("{.reg .pred p; .reg .b32 t; and.b32 t, $3, $4; setp.ne.b32 p, t, 0; selp.f32 $0, $1, $2, p;}")


class PackedMask(NamedTuple):
    """The words of a mask, and which of (batch, head, query) it varies over; () without a mask."""

    by_keys: Maybe = None
    by_queries: Maybe = None
    varies: tuple[bool, ...] = ()


@triton.jit(do_not_specialize=["M", "N", "heads"])
def pack_kernel(
    mask, by_keys, by_queries, scale, batch_shape, M, N, heads, group,
    SIDE: tl.constexpr, MASK_LAYOUT: tl.constexpr,
):  # fmt: skip
    """One program: a square of the mask, read once. A layout that is not wanted is None."""
    rows = tl.where(mask.strides[0] != 0, M, 1)
    heads = tl.where(from_odd(mask.strides[1]) != 0, heads, 1)
    across, down = tl.cdiv(N, SIDE), tl.cdiv(rows, SIDE)
    pid = tl.program_id(0)
    n0 = (pid % across) * SIDE
    m0 = (pid // across % down) * SIDE
    number = pid // across // down
    head = select_head(mask, number // heads, number % heads, batch_shape, False)

    side, quarter = tl.arange(0, SIDE), tl.arange(0, 4)
    last = tl.where(mask.strides[0] != 0, M, m0 + SIDE)  # mutate: last
    seen = load_mask(head, m0, n0, side[:, None], side[None, :], last, N, MASK_LAYOUT) != 0
    query, key = m0 + side, n0 + side
    if by_keys is not None:
        words = by_keys + number.to(tl.int64) * (across * 4 * rows) + (n0 // 32 + quarter).to(tl.int64)[None, :] * rows
        tl.store(words + query[:, None], pack_words(seen, SIDE), mask=(query < rows)[:, None])
    if by_queries is not None:
        keys = across * SIDE
        first = by_queries + number.to(tl.int64) * (down * 4 * keys)
        words = first + (m0 // 32 + quarter).to(tl.int64)[None, :] * keys
        tl.store(words + key[:, None], pack_words(tl.trans(seen), SIDE))  # mutate: tl.store


@triton.jit
def pack_words(seen, SIDE: tl.constexpr):
    """[SIDE, quarters] words of [SIDE, 128 columns]: of every 8 columns, two are bits of each quarter's word."""
    column = tl.arange(0, 128)
    bit = column // 8 * 2 + column % 2
    bits = tl.where(seen, (1 << bit)[None, :], 0).reshape((SIDE, 16, 4, 2))
    # Two sums: over the two dims merged to one, words were wrong with Triton 3.6 where rows are read byte by byte.
    return tl.sum(tl.sum(bits, 3), 1)


def pack(call: Call, by_keys: bool, by_queries: bool) -> PackedMask:
    """The words in the layouts that are asked for; none without a boolean mask."""
    if call.mask is None or not is_boolean(call.mask_tensor):
        return PackedMask()
    tensor, (_, (row, head, batch)), _ = call.mask
    varies = (batch != odd(0), head != odd(0), row != 0)
    m, n, heads, _ = call.sizes
    by_batch, by_head, by_query = varies
    maps, rows = (call.programs if by_batch else 1) * (heads if by_head else 1), m if by_query else 1
    across, down = -(-n // BLOCK), -(-rows // BLOCK)

    def words(wanted: bool, blocks: int, width: int) -> Maybe:
        return tensor.new_empty((maps, blocks * (BLOCK // 32), width), dtype=torch.int32) if wanted else None

    found = (words(by_keys, across, rows), words(by_queries, down, across * BLOCK))
    args = (call.mask, *found)
    call.launch(pack_kernel, "pack", maps * across * down, args, 0.0, warps=8, stages=1, SIDE=BLOCK)
    return PackedMask(*found, varies)


@gluon.jit
def packed_by_key(mask, batch, head, heads, M, N, VARIES: gl.constexpr):
    """The packed mask of one head for tiles [queries, keys]: (pointer, words of a quarter, words of a block), or ()."""
    if mask is None:
        return ()
    else:
        BY_QUERY: gl.constexpr = VARIES[2]
        rows = M if BY_QUERY else 1
        first = mask + _number(batch, head, heads, VARIES) * (gl.cdiv(N, 128) * 4 * rows)
        return (first, rows, 4 * rows)


@gluon.jit
def packed_by_query(mask, batch, head, heads, M, N, VARIES: gl.constexpr):
    """Likewise for tiles [keys, queries]."""
    if len(mask) == 0:
        return ()
    else:
        BY_QUERY: gl.constexpr = VARIES[2]
        blocks = gl.cdiv(M, 128) * 4 if BY_QUERY else 4
        keys = gl.cdiv(N, 128) * 128
        first = mask[0] + _number(batch, head, heads, VARIES) * (blocks * keys)
        return (first, keys, 4 * keys if BY_QUERY else 0)


@gluon.jit
def _number(batch, head, heads, VARIES: gl.constexpr):
    """The number of a head's mask among those that are packed."""
    BY_BATCH: gl.constexpr = VARIES[0]
    BY_HEAD: gl.constexpr = VARIES[1]
    number = (batch * heads if BY_HEAD else batch) if BY_BATCH else batch * 0
    number = number + head if BY_HEAD else number  # mutate: number
    return number.to(gl.int64)


@gluon.constexpr_function
def bit_layout(pairs):
    """The layout of a [64, 8 * pairs] accumulator as [row, 8 columns, quarter, column]."""
    registers = [[0, 0, 0, 1], [8, 0, 0, 0]] + [[0, 1 << i, 0, 0] for i in range(pairs.bit_length() - 1)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, pairs, 4, 2])


@gluon.constexpr_function
def along(layout, dims):
    """The layout of a tensor with only these dims of four."""
    for dim in reversed(range(4)):
        if dim not in dims:
            layout = gl.SliceLayout(dim, layout)
    return layout


@gluon.jit
def load_mask_tile(words, row0, tile, COLUMNS: gl.constexpr, KEYS_FIRST: gl.constexpr = False):
    """(words [64, quarters],) of 64 rows from `row0` on and of a tile of COLUMNS columns, or () without a mask.

    The tile's bits are the lowest of each word. Rows are queries, for all of which a mask may have one row, or keys
    (KEYS_FIRST).
    """
    if len(words) == 0:
        return ()
    else:
        first, rows, step = words
        WORDS: gl.constexpr = along(bit_layout(COLUMNS // 8), (0, 2))
        row = row0 + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, WORDS))
        if not KEYS_FIRST:
            row = gl.minimum(row, rows - 1)  # mutate: row
        # mutate: quarter
        quarter = gl.arange(0, 4, gl.SliceLayout(0, WORDS)) * rows + tile * COLUMNS // 128 * step
        # mutate: return gl load
        return (gl.load(first + (quarter[None, :] + row[:, None])) >> (tile * COLUMNS % 128 // 4),)


@gluon.jit
def where_allowed(x, words, other, LAYOUT: gl.constexpr):
    """x [64, columns] where the mask is True, `other` elsewhere."""
    if len(words) == 0:
        return x
    else:
        PAIRS: gl.constexpr = x.shape[1] // 8
        BIT_LAYOUT: gl.constexpr = bit_layout(PAIRS)
        # mutate: pair
        pair = gl.arange(0, PAIRS, along(BIT_LAYOUT, (1,)))[None, :, None, None] * 2
        bit = 1 << (pair + gl.arange(0, 2, along(BIT_LAYOUT, (3,)))[None, None, None, :])
        groups = gl.convert_layout(x.reshape([CONSUMER_ROWS, PAIRS, 4, 2]), BIT_LAYOUT)
        other = gl.full(groups.shape, other, gl.float32, BIT_LAYOUT)
        groups = gl.inline_asm_elementwise(
            SELECT, "=f,f,f,r,r", [groups, other, words[0][:, None, :, None], bit], gl.float32, is_pure=True, pack=1
        )
        return gl.convert_layout(groups.reshape([CONSUMER_ROWS, x.shape[1]]), LAYOUT)
