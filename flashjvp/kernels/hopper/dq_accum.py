"""Accumulates d_q and d_q_t in global memory: each program adds what its keys give; MATH.md (15), (18).

For head dims of two column chunks. The accumulators are float32, and programs add to them in any order. Both consumers
store dS and dS_t of their keys in shared memory. One tile later, when both have, each adds its share of the products
with all keys. This comes late in an iteration, when the registers of the scores are free again. dS and dS_t of
iteration i have number i + 1; number 0 is zeros, the tile before the first.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .blocks import CONSUMER_ROWS
from .chunks import zero
from .pipeline import accumulator, barrier_of, make_barriers, resident_rows
from .triton_compat import here


class Dq(NamedTuple):
    """What both consumers need to add to d_q / c and d_q_t / c."""

    accums: Any  # the two accumulators
    ds_tiles: Any  # a stage has dS of both consumers, then dS_t of both; or of both [dS, dS_t] in one tile
    ready: Any  # both consumers have stored a stage
    free: Any  # both are through with it
    done: Any  # both are through with the tiles of k and k_t
    k: Any
    k_t: Any


@gluon.jit
def allocate(accums, k, k_t, ROWS: gl.constexpr, SUB_TILES: gl.constexpr, BUFFER_STAGES: gl.constexpr):
    """`Dq` for tiles of ROWS = 64 queries, stored in SUB_TILES pieces; BUFFER_STAGES tiles are in flight."""
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        2 * ROWS // SUB_TILES, 16
    )  # no sub-tile begins inside a swizzled row
    ds_tiles = gl.allocate_shared_memory(k[0].dtype, [4 * BUFFER_STAGES, CONSUMER_ROWS, ROWS], DS_LAYOUT)
    ready, free, done = make_barriers(BUFFER_STAGES, 2), make_barriers(BUFFER_STAGES, 2), make_barriers(1, 2)
    return Dq(accums, ds_tiles, ready, free, done, k, k_t)


@gluon.constexpr_function
def in_order(columns):
    """The layout in which a [64, columns] accumulator has the order of global memory."""
    registers = [[1], [2]] + [[512 << i] for i in range((columns // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[4], [8], [16], [32], [64]], [[128], [256]], [], [64 * columns])


@gluon.jit
def to_order(total):
    """A [64, columns] accumulator in that order."""
    COLUMNS: gl.constexpr = total.shape[1]
    total = total.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([CONSUMER_ROWS * COLUMNS])
    return gl.convert_layout(total, in_order(COLUMNS))


@gluon.jit
def from_order(numbers, COLUMNS: gl.constexpr):
    """Numbers in that order as a [64, columns] accumulator."""
    numbers = numbers.reshape([COLUMNS // 8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
    return gl.convert_layout(numbers.reshape([CONSUMER_ROWS, COLUMNS]), accumulator(COLUMNS))


@gluon.jit
def atomic_add_tile(dq_accum, total):
    """Adds a [64, columns] accumulator to global memory, in the order in which threads hold it: 16 bytes of a thread
    side by side, and 512 of a warp."""
    COLUMNS: gl.constexpr = total.shape[1]
    offsets = gl.arange(0, CONSUMER_ROWS * COLUMNS, in_order(COLUMNS))
    gl.atomic_add(dq_accum + offsets, to_order(total), sem="relaxed")


@gluon.jit
def store_zeros(dq, consumer: gl.constexpr):
    """Stores zeros as number 0."""
    COLUMNS: gl.constexpr = dq.ds_tiles.shape[2]
    nothing = (gl.zeros([CONSUMER_ROWS, COLUMNS], dq.ds_tiles.dtype, accumulator(COLUMNS)),)
    store_ds(dq, nothing * (dq.ds_tiles.shape[0] // (2 * dq.ready.shape[0])), 0, consumer)


@gluon.jit
def accumulate(dq, ds, ds_t, at, consumer: gl.constexpr, COLUMNS: gl.constexpr):
    """Stores dS and dS_t of a sub-tile of this iteration. Once a tile it adds the products of the tile before: first,
    if there is one buffer stage only."""
    BUFFER_STAGES: gl.constexpr = dq.ready.shape[0]
    if BUFFER_STAGES == 1 and at.SUB_TILE == 0:
        add_dq(dq, at.before, at.iteration, consumer, COLUMNS)
    store_ds(dq, (ds, ds_t), at.iteration + 1, consumer, at.SUB_TILE, at.SUB_TILES)
    if BUFFER_STAGES > 1 and at.SUB_TILE == at.SUB_TILES - 1:
        add_dq(dq, at.before, at.iteration, consumer, COLUMNS)


@gluon.jit
def await_readers(dq):
    """Waits until no consumer reads the tiles of k and k_t any more."""
    mbarrier.arrive(dq.done.index(0), count=1)
    mbarrier.wait(dq.done.index(0), 0)


@gluon.jit
def store_ds(dq, tiles, number, consumer: gl.constexpr, SUB_TILE: gl.constexpr = 0, SUB_TILES: gl.constexpr = 1):
    """Stores this consumer's tiles, dS and dS_t or both in one, for both consumers."""
    COLUMNS: gl.constexpr = tiles[0].shape[1]
    buffer = number % dq.ready.shape[0]
    if SUB_TILE == 0:
        free, phase = barrier_of(dq.free, number)
        mbarrier.wait(free, phase ^ 1)  # mutate: mbarrier.wait (1)
    for i in gl.static_range(len(tiles)):
        stored = dq.ds_tiles.index(buffer * (2 * len(tiles)) + (2 * i + consumer) + (number >> 30))
        stored.slice(SUB_TILE * COLUMNS, COLUMNS, 1).store(tiles[i])  # mutate: store
    if SUB_TILE == SUB_TILES - 1:
        fence_async_shared()
        mbarrier.arrive(dq.ready.index(buffer), count=1)


@gluon.jit
def _add_ds_product(total, dq, keys, number, TANGENT: gl.constexpr, USE_ACC: gl.constexpr = True):
    """In flight: total + dS.T @ keys, or dS_t.T @ keys, of this number; `keys` are one column chunk."""
    for source in gl.static_range(2):
        ds = dq.ds_tiles.index(number % dq.ready.shape[0] * 4 + 2 * TANGENT + source + (number >> 30) + here())
        rows = resident_rows((keys,), source + here(), number)[0]
        total = warpgroup_mma(ds.permute((1, 0)), rows, total, use_acc=USE_ACC or source > 0, is_async=True)
    return total


@gluon.jit
def without_padding(total, COLUMNS: gl.constexpr):
    """The accumulator without its second half where that only pads the head dim."""
    WIDTH: gl.constexpr = total.shape[1]
    if WIDTH > COLUMNS:
        first, _second = gl.split(total.reshape([CONSUMER_ROWS, 2, WIDTH // 2]).permute((0, 2, 1)))
        return gl.convert_layout(first, accumulator(WIDTH // 2))
    else:
        return total


@gluon.jit
def add_dq(dq, dq_tile, number, consumer: gl.constexpr, COLUMNS: gl.constexpr):
    """Adds the products of this number, tile `dq_tile` of all heads, to d_q / c and d_q_t / c.

    A consumer adds one column chunk of each, the other consumer the other ones.
    """
    k, k_t = dq.k, dq.k_t
    FIRST: gl.constexpr = k[0].shape[4]
    OTHER: gl.constexpr = 1 - consumer
    buffer = number % dq.free.shape[0]
    tile = dq_tile.to(gl.int64) * (CONSUMER_ROWS * COLUMNS)  # mutate: tile
    ready, phase = barrier_of(dq.ready, number)
    mbarrier.wait(ready, phase)  # mutate: mbarrier.wait (2)
    # mutate: total_t
    total_t = _add_ds_product(zero(k[consumer].shape[4]), dq, k[consumer], number, 1, USE_ACC=False)
    total = _add_ds_product(zero(k[OTHER].shape[4]), dq, k[OTHER], number, 0, USE_ACC=False)
    total = _add_ds_product(total, dq, k_t[OTHER], number, 1)  # mutate: total
    total_t = warpgroup_mma_wait(4, deps=[total_t])
    total_t = without_padding(total_t, COLUMNS - consumer * FIRST)
    atomic_add_tile(dq.accums[1] + (tile + consumer * CONSUMER_ROWS * FIRST), total_t)
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(dq.free.index(buffer), count=1)
    total = without_padding(total, COLUMNS - OTHER * FIRST)
    # mutate: atomic_add_tile
    atomic_add_tile(dq.accums[0] + (tile + OTHER * CONSUMER_ROWS * FIRST), total)
