"""Accumulates d_q and d_q_t in global memory: each program adds what its keys give; MATH.md (15), (18).

For head dims of two column chunks. The accumulators are float32, and programs add to them in any order. Both consumers
store dS and dS_t of their keys in shared memory. One tile later, when both have, each adds its share of the products
with all keys. This comes late in an iteration, when the registers of the scores are free again.

`dq` is what both consumers share: the accumulators, tiles of dS and dS_t, three barriers, and the tiles of k and k_t.
"""

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
from .pipeline import accumulator, make_barriers, resident_rows
from .triton_compat import here


@gluon.jit
def allocate(dq_accum, k, k_t, ROWS: gl.constexpr, SUB_TILES: gl.constexpr, BUFFER_STAGES: gl.constexpr):
    """`dq` for tiles of ROWS = 64 queries, stored in SUB_TILES pieces; BUFFER_STAGES tiles are in flight.

    A stage is dS of both consumers, then dS_t of both.
    """
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        2 * ROWS // SUB_TILES, 16
    )  # no sub-tile begins inside a swizzled row
    ds_tiles = gl.allocate_shared_memory(k[0].dtype, [4 * BUFFER_STAGES, CONSUMER_ROWS, ROWS], DS_LAYOUT)
    ready, free, done = make_barriers(BUFFER_STAGES, 2), make_barriers(BUFFER_STAGES, 2), make_barriers(1, 2)
    return dq_accum, ds_tiles, ready, free, done, k, k_t


@gluon.constexpr_function
def _buffer_stages(ds_tiles):
    return ds_tiles.shape[0] // 4


@gluon.constexpr_function
def _in_order(columns):
    """The layout in which a [64, columns] accumulator has the order of global memory."""
    registers = [[1], [2]] + [[512 << i] for i in range((columns // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[4], [8], [16], [32], [64]], [[128], [256]], [], [64 * columns])


@gluon.jit
def atomic_add_tile(dq_accum, total):
    """Adds a [64, columns] accumulator to global memory, in the order in which threads hold it: 16 bytes of a thread
    side by side, and 512 of a warp."""
    COLUMNS: gl.constexpr = total.shape[1]
    total = total.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([CONSUMER_ROWS * COLUMNS])
    offsets = gl.arange(0, CONSUMER_ROWS * COLUMNS, _in_order(COLUMNS))
    gl.atomic_add(dq_accum + offsets, gl.convert_layout(total, _in_order(COLUMNS)), sem="relaxed")


@gluon.jit
def store_zeros(dq, consumer: gl.constexpr):
    """Stores zeros as dS number 0: the tile before the first."""
    ds_tiles = dq[1]
    ROWS: gl.constexpr = ds_tiles.shape[2]
    nothing = gl.zeros([CONSUMER_ROWS, ROWS], ds_tiles.dtype, accumulator(ROWS))
    _store_ds(dq, nothing, nothing, 0, consumer, 0, 1)


@gluon.jit
def accumulate(
    dq, ds, ds_t, dq_tile, iteration, consumer: gl.constexpr, COLUMNS: gl.constexpr, SUB_TILE: gl.constexpr,
    SUB_TILES: gl.constexpr,
):  # fmt: skip
    """Stores dS and dS_t of a sub-tile of this iteration, which has number iteration + 1. Once a tile it adds the
    products of the tile before: first, if there is one buffer stage only."""
    BUFFER_STAGES: gl.constexpr = _buffer_stages(dq[1])
    if BUFFER_STAGES == 1 and SUB_TILE == 0:
        _add_dq(dq, dq_tile, iteration, consumer, COLUMNS)
    _store_ds(dq, ds, ds_t, iteration + 1, consumer, SUB_TILE, SUB_TILES)
    if BUFFER_STAGES > 1 and SUB_TILE == SUB_TILES - 1:
        _add_dq(dq, dq_tile, iteration, consumer, COLUMNS)


@gluon.jit
def finish(dq, dq_tile, iteration, consumer: gl.constexpr, COLUMNS: gl.constexpr):
    """Adds the products of the last tile, and waits until nobody reads keys any more."""
    if iteration > 0:
        _add_dq(dq, dq_tile, iteration, consumer, COLUMNS)
    done = dq[4]
    mbarrier.arrive(done.index(0), count=1)
    mbarrier.wait(done.index(0), 0)


@gluon.jit
def _store_ds(dq, ds, ds_t, iteration, consumer: gl.constexpr, SUB_TILE: gl.constexpr, SUB_TILES: gl.constexpr):
    """Stores this consumer's dS and dS_t number `iteration` for both consumers."""
    ds_tiles, ready, free = dq[1], dq[2], dq[3]
    BUFFER_STAGES: gl.constexpr = _buffer_stages(ds_tiles)
    ROWS: gl.constexpr = ds.shape[1]
    buffer = iteration % BUFFER_STAGES
    if SUB_TILE == 0:
        # mutate: mbarrier.wait (1)
        mbarrier.wait(free.index(buffer), (iteration // BUFFER_STAGES & 1) ^ 1)
    ds_tiles.index(buffer * 4 + consumer + (iteration >> 30)).slice(SUB_TILE * ROWS, ROWS, 1).store(ds)
    # mutate: ds_tiles.index
    ds_tiles.index(buffer * 4 + 2 + consumer + (iteration >> 30)).slice(SUB_TILE * ROWS, ROWS, 1).store(ds_t)
    if SUB_TILE == SUB_TILES - 1:
        fence_async_shared()
        mbarrier.arrive(ready.index(buffer), count=1)


@gluon.jit
def _add_ds_product(total, ds_tiles, keys, iteration, TANGENT: gl.constexpr, USE_ACC: gl.constexpr = True):
    """In flight: total + dS.T @ keys, or dS_t.T @ keys, of number `iteration`; `keys` are one column chunk."""
    for source in gl.static_range(2):
        ds = ds_tiles.index(
            iteration % _buffer_stages(ds_tiles) * 4 + 2 * TANGENT + source + (iteration >> 30) + here()
        )
        rows = resident_rows((keys,), source + here(), iteration)[0]
        total = warpgroup_mma(ds.permute((1, 0)), rows, total, use_acc=USE_ACC or source > 0, is_async=True)
    return total


@gluon.jit
def _without_padding(total, COLUMNS: gl.constexpr):
    """The accumulator without its second half where that only pads the head dim."""
    WIDTH: gl.constexpr = total.shape[1]
    if WIDTH > COLUMNS:
        first, _second = gl.split(total.reshape([CONSUMER_ROWS, 2, WIDTH // 2]).permute((0, 2, 1)))
        return gl.convert_layout(first, accumulator(WIDTH // 2))
    else:
        return total


@gluon.jit
def _add_dq(dq, dq_tile, iteration, consumer: gl.constexpr, COLUMNS: gl.constexpr):
    """Adds the products of number `iteration`, tile `dq_tile` of all heads, to d_q / c and d_q_t / c.

    A consumer adds one column chunk of each, the other consumer the other ones.
    """
    dq_accum, ds_tiles, ready, free, _done, k, k_t = dq
    BUFFER_STAGES: gl.constexpr = _buffer_stages(ds_tiles)
    FIRST: gl.constexpr = k[0].shape[4]
    OTHER: gl.constexpr = 1 - consumer
    buffer = iteration % BUFFER_STAGES
    tile = dq_tile.to(gl.int64) * (CONSUMER_ROWS * COLUMNS)  # mutate: tile
    # mutate: mbarrier.wait (2)
    mbarrier.wait(ready.index(buffer), (iteration // BUFFER_STAGES) & 1)
    # mutate: total_t
    total_t = _add_ds_product(zero(k[consumer].shape[4]), ds_tiles, k[consumer], iteration, 1, USE_ACC=False)
    total = _add_ds_product(zero(k[OTHER].shape[4]), ds_tiles, k[OTHER], iteration, 0, USE_ACC=False)
    total = _add_ds_product(total, ds_tiles, k_t[OTHER], iteration, 1)  # mutate: total
    total_t = warpgroup_mma_wait(4, deps=[total_t])
    total_t = _without_padding(total_t, COLUMNS - consumer * FIRST)
    atomic_add_tile(dq_accum[1] + (tile + consumer * CONSUMER_ROWS * FIRST), total_t)
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(free.index(buffer), count=1)
    total = _without_padding(total, COLUMNS - OTHER * FIRST)
    # mutate: atomic_add_tile
    atomic_add_tile(dq_accum[0] + (tile + OTHER * CONSUMER_ROWS * FIRST), total)
