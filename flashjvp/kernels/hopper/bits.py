"""Boolean masks as the warp-specialised kernels read them: a bit for each query and key, 32 in a word.

Words lie along the rows of a tile, so that a warp reads neighbours: `by_keys` [head, block of 32 keys, query]
for tiles [queries, keys] and `by_queries` [head, block of 32 queries, key] for tiles [keys, queries]. Keys beyond the
end have the bit 0. What a mask repeats is packed once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..launch import Call, Maybe
from ..schedule import Tile
from ..tiles import from_odd, odd, select_head
from .ring import HALF

BLOCK = 128  # queries and keys that a program packs


class Bits(NamedTuple):
    """A mask in words, and over which of (batch, head, query) it varies; () without a mask."""

    by_keys: Maybe = None
    by_queries: Maybe = None
    varies: tuple[bool, ...] = ()


@triton.jit(do_not_specialize=["M", "N", "heads"])
def pack_kernel(
    mask, by_keys, by_queries, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a square of the mask, read once. An absent result is None."""
    SIDE: tl.constexpr = TILE[0]
    WORDS: tl.constexpr = SIDE // 32
    rows = tl.where(mask.strides[0] != 0, M, 1)
    heads = tl.where(from_odd(mask.strides[1]) != 0, heads, 1)
    across, down = tl.cdiv(N, SIDE), tl.cdiv(rows, SIDE)
    pid = tl.program_id(0)
    n0 = (pid % across) * SIDE
    m0 = (pid // across % down) * SIDE
    number = pid // across // down
    first, stride = select_head(mask, number // heads, number % heads, batch_shape, False)

    query, key = m0 + tl.arange(0, SIDE), n0 + tl.arange(0, SIDE)
    there = (query < tl.where(mask.strides[0] != 0, M, m0 + SIDE))[:, None] & (key < N)[None, :]
    seen = tl.load(first + query.to(tl.int64)[:, None] * stride + (key * MASK_LAYOUT[0])[None, :], mask=there, other=0)
    seen = (seen != 0).to(tl.int32)
    word = tl.arange(0, WORDS)
    if by_keys is not None:
        packed = tl.sum((seen << (key % 32)[None, :]).reshape((SIDE, WORDS, 32)), 2)
        place = by_keys + number.to(tl.int64) * (across * WORDS * rows) + (n0 // 32 + word).to(tl.int64)[None, :] * rows
        tl.store(place + query[:, None], packed, mask=(query < rows)[:, None])
    if by_queries is not None:
        packed = tl.sum((seen << (query % 32)[:, None]).reshape((WORDS, 32, SIDE)), 1)
        place = by_queries + number.to(tl.int64) * (down * WORDS * N) + (m0 // 32 + word).to(tl.int64)[:, None] * N
        tl.store(place + key[None, :], packed, mask=(key < N)[None, :])


def can_pack(call: Call) -> bool:
    """Whether the call's mask is boolean (that comes as bytes), and 32 bits count the words of a head."""
    m, n, _, _ = call.sizes
    return call.mask is not None and call.mask[0].element_size() == 1 and (m + BLOCK) * (n + BLOCK) < 1 << 36


def pack(call: Call, by_keys: bool, by_queries: bool) -> Bits:
    """The words that are asked for; without a mask none."""
    if call.mask is None:
        return Bits()
    tensor, (_, (row, head, *batch)), _ = call.mask
    varies = (batch[0] != odd(0), head != odd(0), row != 0)
    m, n, heads, _ = call.sizes
    maps, rows = (call.programs if varies[0] else 1) * (heads if varies[1] else 1), m if varies[2] else 1
    across, down = -(-n // BLOCK), -(-rows // BLOCK)

    def words(wanted: bool, blocks: int, width: int) -> Maybe:
        return tensor.new_empty((maps, blocks * (BLOCK // 32), width), dtype=torch.int32) if wanted else None

    found = (words(by_keys, across, rows), words(by_queries, down, n))
    call.launch(pack_kernel, "pack", lambda tile: maps * across * down, (call.mask, *found), 0.0, Tile(BLOCK, 0, 8, 1))
    return Bits(*found, varies)


@gluon.jit
def words_by_keys(mask, batch, head, heads, M, N, VARIES: gl.constexpr):
    """Of the queries of a head: (pointer, words of a block, words from a block to the next), or ()."""
    if mask is None:
        return ()
    else:
        rows = M if VARIES[2] else 1
        first = mask + _number(batch, head, heads, VARIES) * (gl.cdiv(N, 128) * 4 * rows)
        return (first, rows, rows)


@gluon.jit
def words_by_queries(mask, batch, head, heads, M, N, VARIES: gl.constexpr):
    """The same of the keys, for the queries of one head."""
    if len(mask) == 0:
        return ()
    else:
        blocks = gl.cdiv(M, 128) * 4 if VARIES[2] else 4
        first = mask[0] + _number(batch, head, heads, VARIES) * (blocks * N)
        return (first, N, N if VARIES[2] else 0)


@gluon.jit
def _number(batch, head, heads, VARIES: gl.constexpr):
    """Of a head's map among those that are packed."""
    number = (batch * heads if VARIES[1] else batch) if VARIES[0] else batch * 0
    number = number + head if VARIES[1] else number
    return number.to(gl.int64)


@gluon.constexpr_function
def _by_bits(words):
    """The layout of a [64, 32 * words] accumulator as [row, word, 8 columns, pair of columns, column]."""
    registers = [[0, 0, 0, 0, 1], [8, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0]]
    registers += [[0, 1 << i, 0, 0, 0] for i in range(words.bit_length() - 1)]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    warps = [[16, 0, 0, 0, 0], [32, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, words, 4, 4, 2])


@gluon.constexpr_function
def _along(layout, dims):
    """The layout of what lies along some of the dims, in order, without the others."""
    for dim in reversed(range(5)):
        if dim not in dims:
            layout = gl.SliceLayout(dim, layout)
    return layout


@gluon.jit
def load_words(words, row0, tile, COLUMNS: gl.constexpr):
    """Of a tile of COLUMNS columns and the 64 rows from `row0` on: ([64, words],), or () without a mask."""
    if len(words) == 0:
        return ()
    else:
        first, rows, stride = words
        COUNT: gl.constexpr = COLUMNS // 32
        BITS: gl.constexpr = _by_bits(COUNT)
        row = gl.minimum(row0 + gl.arange(0, HALF, _along(BITS, (0,))), rows - 1)
        block = tile * COUNT + gl.arange(0, COUNT, _along(BITS, (1,)))
        return (gl.load(first + ((block * stride)[None, :] + row[:, None])),)


@gluon.jit
def where_allowed(x, words, other, LAYOUT: gl.constexpr):
    """x of a tile where the mask is True, `other` elsewhere."""
    if len(words) == 0:
        return x
    else:
        COUNT: gl.constexpr = x.shape[1] // 32
        BITS: gl.constexpr = _by_bits(COUNT)
        # The first shift depends on the thread; after it every bit has a place that the compiler knows.
        pair = gl.arange(0, 4, _along(BITS, (3,)))[None, None, None, :, None]
        place = gl.arange(0, 4, _along(BITS, (2,)))[None, None, :, None, None] * 8
        place = place + gl.arange(0, 2, _along(BITS, (4,)))[None, None, None, None, :]
        shifted = words[0][:, :, None, None, None] >> (pair * 2)
        allowed = ((shifted >> place) & 1) != 0
        parts = gl.convert_layout(x.reshape([HALF, COUNT, 4, 4, 2]), BITS)
        return gl.convert_layout(gl.where(allowed, parts, other).reshape([HALF, 32 * COUNT]), LAYOUT)
