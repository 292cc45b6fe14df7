"""What the two consumers of a wide kernel give each other through shared memory.

One tile of each kind suffices: a consumer gives the next one only after it has waited for what the other one made of
the last.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .blocks import CONSUMER_ROWS
from .dq_accum import from_order, in_order, to_order
from .pipeline import accumulator, left_operand, make_barriers

ROW_NUMBERS = gl.constexpr(4)  # numbers of each row, in the forward pass
ALPHA = gl.constexpr(0)
TILE_SUM = gl.constexpr(1)
SUM = gl.constexpr(2)
NEGATIVE_STEP = gl.constexpr(3)
# What is ready.
P = gl.constexpr(0)
WEIGHTS_T = gl.constexpr(1)
S_T = gl.constexpr(2)
WEIGHTS = gl.constexpr(3)


class Exchange(NamedTuple):
    """Tiles of [64, streamed rows] and numbers of the 64 rows."""

    numbers: Any  # a float32 tile, in the order in which threads hold an accumulator
    weights: Any  # tiles of left operands
    rows: Any  # ROW_NUMBERS of each row
    ready: Any  # barriers


@gluon.jit
def allocate_exchange(streamed, WEIGHTS_TILES: gl.constexpr):
    """`Exchange` for streamed tiles as this descriptor has them."""
    ROWS: gl.constexpr = streamed.block_shape[2]
    OF_WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(min(2 * ROWS, 128), 16, rank=2)
    numbers = gl.allocate_shared_memory(gl.float32, [CONSUMER_ROWS * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    weights = gl.allocate_shared_memory(streamed.dtype, [WEIGHTS_TILES, CONSUMER_ROWS, ROWS], OF_WEIGHTS)
    OF_ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows = gl.allocate_shared_memory(gl.float32, [ROW_NUMBERS, CONSUMER_ROWS], OF_ROWS)
    return Exchange(numbers, weights, rows, make_barriers(4, 1))


@gluon.jit
def give(inputs, what: gl.constexpr):
    """What was stored is ready for the other consumer."""
    mbarrier.arrive(inputs.exchange.ready.index(what), count=1)


@gluon.jit
def await_given(inputs, what: gl.constexpr):
    """Waits for what the other consumer gives in this iteration."""
    mbarrier.wait(inputs.exchange.ready.index(what), inputs.iteration & 1)  # mutate: mbarrier.wait


@gluon.jit
def store_numbers(inputs, x):
    inputs.exchange.numbers.store(to_order(x))


@gluon.jit
def load_numbers(inputs):
    COLUMNS: gl.constexpr = inputs.exchange.weights.shape[2]
    return from_order(inputs.exchange.numbers.load(in_order(COLUMNS)), COLUMNS)


@gluon.jit
def store_weights(inputs, which: gl.constexpr, weights):
    inputs.exchange.weights.index(which).store(weights)


@gluon.jit
def load_weights(inputs, which: gl.constexpr, tile):
    """Weights as left operands for products with one chunk."""
    return (inputs.exchange.weights.index(which).load(left_operand(tile[0].shape[1])),)


@gluon.jit
def store_row_number(inputs, which: gl.constexpr, x):
    inputs.exchange.rows.index(which).store(x)


@gluon.jit
def load_row_number(inputs, which: gl.constexpr):
    COLUMNS: gl.constexpr = inputs.exchange.weights.shape[2]
    return inputs.exchange.rows.index(which).load(gl.SliceLayout(1, accumulator(COLUMNS)))


@gluon.jit
def chunk_of(tensors, CHUNK: gl.constexpr):
    """One column chunk of each tensor."""
    found = ()
    for i in gl.static_range(len(tensors)):
        found = found + ((tensors[i][CHUNK],),)
    return found
