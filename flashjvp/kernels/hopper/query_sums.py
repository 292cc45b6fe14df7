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
from .ring import HALF, own_rows

SLOTS = gl.constexpr(2)  # of dS and dS_t


@gluon.constexpr_function
def _in_order(columns):
    """The layout of a [64, columns] accumulator whose numbers are counted as in global memory."""
    registers = [[1], [2]] + [[512 << i] for i in range((columns // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[4], [8], [16], [32], [64]], [[128], [256]], [], [64 * columns])


@gluon.constexpr_function
def sum_size(tiles):
    """Numbers of a tile of 64 queries, whose chunks lie one after the other."""
    return HALF * sum([x.shape[4] for x in tiles])


@gluon.jit
def add_to_sum(sum, total):
    """Adds a [64, columns] accumulator, in the order in which threads hold it: 16 bytes of a thread side by side, and
    512 of a warp."""
    COLUMNS: gl.constexpr = total.shape[1]
    total = total.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([HALF * COLUMNS])
    offsets = gl.arange(0, HALF * COLUMNS, _in_order(COLUMNS))
    gl.atomic_add(sum + offsets, gl.convert_layout(total, _in_order(COLUMNS)), sem="relaxed")


@gluon.jit
def leave(queries, ds, ds_t, at, who: gl.constexpr):
    """Leaves dS and dS_t of this consumer's keys for both consumers; number 0 are zeros, and tile `at` has at + 1."""
    deltas, ready, free = queries[1], queries[2], queries[3]
    slot = at % SLOTS
    mbarrier.wait(free.index(slot), (at // SLOTS & 1) ^ 1)
    deltas.index(slot * 4 + who + (at >> 30)).store(ds)
    deltas.index(slot * 4 + 2 + who + (at >> 30)).store(ds_t)
    fence_async_shared()
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def _with_keys(total, deltas, keys, at, TANGENT: gl.constexpr, USE_ACC: gl.constexpr = True):
    """In flight: total + dS.T @ keys, or dS_t.T @ keys, of the tile before; `keys` are a chunk of all of them."""
    for half in gl.static_range(2):
        weights = deltas.index(at % SLOTS * 4 + 2 * TANGENT + half + (at >> 30)).permute((1, 0))
        rows = own_rows((keys,), half, at)[0]
        total = warpgroup_mma(weights, rows, total, use_acc=USE_ACC or half > 0, is_async=True)
    return total


@gluon.jit
def add_queries(queries, k, k_t, index, at, who: gl.constexpr):
    """Adds, of the tile before this one, which has the number `index`, d_q / c (15) and d_q_t / c (18).

    d_q is two products and d_q_t is one: one consumer has the first chunk of d_q, the other one all the rest.
    """
    sums, deltas, ready, free = queries
    slot = at % SLOTS
    mbarrier.wait(ready.index(slot), (at // SLOTS) & 1)
    tangents = ()
    values = ()
    for i in gl.static_range(len(k)):
        if who == 0:
            tangents = tangents + (_with_keys(zero(k[i].shape[4]), deltas, k[i], at, 1, USE_ACC=False),)
    for i in gl.static_range(len(k)):
        if (i == 0) == (who == 1):
            value = _with_keys(zero(k[i].shape[4]), deltas, k[i], at, 0, USE_ACC=False)
            values = values + (_with_keys(value, deltas, k_t[i], at, 1),)
    WIDTH: gl.constexpr = k[0].shape[4]
    place = index.to(gl.int64) * sum_size(k)
    for i in gl.static_range(len(tangents)):
        total = warpgroup_mma_wait(2 * (len(tangents) - 1 - i) + 4 * len(values), deps=[tangents[i]])
        if len(values) == 0 and i == len(tangents) - 1:
            mbarrier.arrive(free.index(slot), count=1)
        add_to_sum(sums[1] + (place + i * HALF * WIDTH), total)
    for i in gl.static_range(len(values)):
        total = warpgroup_mma_wait(4 * (len(values) - 1 - i), deps=[values[i]])
        if i == len(values) - 1:
            mbarrier.arrive(free.index(slot), count=1)
        add_to_sum(sums[0] + (place + (1 - who + i) * HALF * WIDTH), total)
