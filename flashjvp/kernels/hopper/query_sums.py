"""What a program that owns keys adds to d_q and d_q_t: float32 sums in global memory, in any order.

Both consumers leave dS and dS_t of their keys in shared memory. A tile later, when the other one has, too, each adds
its share of the products with all keys; MATH.md (15), (18). These products come last in an iteration, when the
registers of the scores are free again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .chunks import zero
from .ring import HALF, accumulator, own_rows


@gluon.constexpr_function
def slots(deltas):
    """For how many tiles there is room."""
    return deltas.shape[0] // 4


@gluon.constexpr_function
def _in_order(columns):
    """The layout of a [64, columns] accumulator whose numbers are counted as in global memory."""
    registers = [[1], [2]] + [[512 << i] for i in range((columns // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[4], [8], [16], [32], [64]], [[128], [256]], [], [64 * columns])


@gluon.jit
def add_to_sum(sum, total):
    """Adds a [64, columns] accumulator, in the order in which threads hold it: 16 bytes of a thread side by side, and
    512 of a warp."""
    COLUMNS: gl.constexpr = total.shape[1]
    total = total.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([HALF * COLUMNS])
    offsets = gl.arange(0, HALF * COLUMNS, _in_order(COLUMNS))
    gl.atomic_add(sum + offsets, gl.convert_layout(total, _in_order(COLUMNS)), sem="relaxed")


@gluon.jit
def leave(queries, ds, ds_t, at, who: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr):
    """Leaves dS and dS_t of this consumer's keys and a part of a tile for both consumers. Number 0 are zeros, and tile
    `at` has at + 1."""
    deltas, ready, free = queries[1], queries[2], queries[3]
    SLOTS: gl.constexpr = slots(deltas)
    ROWS: gl.constexpr = ds.shape[1]
    slot = at % SLOTS
    if PART == 0:
        mbarrier.wait(free.index(slot), (at // SLOTS & 1) ^ 1)
    deltas.index(slot * 4 + who + (at >> 30)).slice(PART * ROWS, ROWS, 1).store(ds)
    deltas.index(slot * 4 + 2 + who + (at >> 30)).slice(PART * ROWS, ROWS, 1).store(ds_t)
    if PART == PARTS - 1:
        fence_async_shared()
        mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def _with_keys(total, deltas, keys, at, TANGENT: gl.constexpr, USE_ACC: gl.constexpr = True):
    """In flight: total + dS.T @ keys, or dS_t.T @ keys, of the tile before; `keys` are a chunk of all of them."""
    for half in gl.static_range(2):
        weights = deltas.index(at % slots(deltas) * 4 + 2 * TANGENT + half + (at >> 30)).permute((1, 0))
        rows = own_rows((keys,), half, at)[0]
        total = warpgroup_mma(weights, rows, total, use_acc=USE_ACC or half > 0, is_async=True)
    return total


@gluon.jit
def _used(total, COLUMNS: gl.constexpr):
    """The accumulator without its second half where that only pads the head dim."""
    WIDTH: gl.constexpr = total.shape[1]
    if WIDTH > COLUMNS:
        first, _second = gl.split(total.reshape([HALF, 2, WIDTH // 2]).permute((0, 2, 1)))
        return gl.convert_layout(first, accumulator(WIDTH // 2))
    else:
        return total


@gluon.jit
def add_queries(queries, k, k_t, index, at, who: gl.constexpr, COLUMNS: gl.constexpr):
    """Adds, of the tile before this one, which has the number `index`, d_q / c (15) and d_q_t / c (18): one chunk of
    each, the other consumer the other ones."""
    sums, deltas, ready, free = queries
    SLOTS: gl.constexpr = slots(deltas)
    FIRST: gl.constexpr = k[0].shape[4]
    OTHER: gl.constexpr = 1 - who
    slot = at % SLOTS
    tile = index.to(gl.int64) * (HALF * COLUMNS)
    mbarrier.wait(ready.index(slot), (at // SLOTS) & 1)
    total_t = _with_keys(zero(k[who].shape[4]), deltas, k[who], at, 1, USE_ACC=False)
    total = _with_keys(zero(k[OTHER].shape[4]), deltas, k[OTHER], at, 0, USE_ACC=False)
    total = _with_keys(total, deltas, k_t[OTHER], at, 1)
    total_t = warpgroup_mma_wait(4, deps=[total_t])
    add_to_sum(sums[1] + (tile + who * HALF * FIRST), _used(total_t, COLUMNS - who * FIRST))
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(free.index(slot), count=1)
    add_to_sum(sums[0] + (tile + OTHER * HALF * FIRST), _used(total, COLUMNS - OTHER * FIRST))
