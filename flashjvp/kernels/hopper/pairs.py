"""Pairs of streamed tensors, for head dims of 64 and 128: two tensors in one tile, one above the other.

A product with a pair is two products that read their left operand once. Reading operands from shared memory is what
takes the time at a head dim of 128. At 64, tiles of queries have 32 rows, and products of 32 columns take as many
cycles as those of 48: those of pairs have 64.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .blocks import CONSUMER_ROWS
from .pipeline import accumulator, copy_tile
from .triton_compat import addressed_here

PIECE = gl.constexpr(64)  # columns of one copy: at a head dim of 128 the tile of a pair is copied in two


@gluon.constexpr_function
def are_pairs(resident, streamed):
    """Whether these descriptors, at a head dim of 128, make pairs of the streamed tensors, whose copies are then
    narrower than a tile."""
    return resident[0].block_shape[-1] > streamed[0].block_shape[-1]


@gluon.jit
def allocate_pairs(tensors, COUNT: gl.constexpr, COLUMNS: gl.constexpr = 2 * PIECE):
    """Shared memory for COUNT tiles of each pair of tensors with COLUMNS columns."""
    tiles = ()
    for i in gl.static_range(len(tensors) // 2):
        x = tensors[2 * i]
        tiles = tiles + (gl.allocate_shared_memory(x.dtype, [COUNT, 1, 1, 2 * x.block_shape[-2], COLUMNS], x.layout),)
    return tiles


@gluon.jit
def allocate_narrow_pairs(tensors, COUNT: gl.constexpr):
    """`allocate_pairs` at a head dim of 64."""
    return allocate_pairs(tensors, COUNT, PIECE)


@gluon.jit
def split_rows(pair):
    """A pair's two tiles, [rows, D] each, addressed here."""
    ROWS: gl.constexpr = pair.shape[0] // 2
    pair = addressed_here(pair)
    return pair.slice(0, ROWS, 0), pair.slice(ROWS, ROWS, 0)  # mutate: return pair slice


@gluon.jit
def split_product(product):
    """Splits a product with two stacked operands.

    Before accumulating into either half, add 0.0 to copy it into its own registers; otherwise ptxas serialises every
    WGMMA (C7511).
    """
    ROWS: gl.constexpr = product.shape[1] // 2
    x, y = gl.split(product.reshape([CONSUMER_ROWS, 2, ROWS]).permute((0, 2, 1)))  # mutate: x, y
    return gl.convert_layout(x, accumulator(ROWS)), gl.convert_layout(y, accumulator(ROWS))


@gluon.jit
def load_pairs(streamed, pairs, stage, bar, batch, head, row, CHUNKS: gl.constexpr):
    """As `load_chunks`, but two tensors are copied into one tile."""
    ROWS: gl.constexpr = streamed[0].block_shape[-2]
    for i in gl.static_range(len(streamed)):
        rows = pairs[i // 2].index(stage).slice(i % 2 * ROWS, ROWS, 2)
        for piece in gl.static_range(rows.shape[3] // PIECE):
            copy_tile(streamed[i], batch, head, row, piece * PIECE, bar, rows.slice(piece * PIECE, PIECE, 3))
