"""d_q and d_q_t as float32 sums in global memory, in any order, to which each program adds what its keys give; MATH.md
(15), (18). For head dims of two column chunks.

Both consumers leave dS and dS_t of their keys in shared memory. A tile of queries later, when the other one has, too,
each adds its share of the products with all keys. These products come late in an iteration, when the registers of the
scores are free again. `queries` is what they share: the sums, room for dS and dS_t, barriers, and the tiles of k, k_t.
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
from .pipeline import HALF, accumulator, barriers, own_rows
from .triton_compat import here


@gluon.jit
def room_for(sums, k, k_t, ROWS: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr):
    """`queries` for tiles of ROWS queries, of which PARTS are left one after the other: SLOTS times dS of both
    consumers, then dS_t. A product has 64 rows: ROWS."""
    DELTA: gl.constexpr = gl.NVMMASharedLayout(2 * ROWS // PARTS, 16)  # no part begins inside a swizzled row
    deltas = gl.allocate_shared_memory(k[0].dtype, [4 * SLOTS, HALF, ROWS], DELTA)
    return sums, deltas, barriers(SLOTS, 2), barriers(SLOTS, 2), barriers(1, 2), k, k_t


@gluon.constexpr_function
def _slots(deltas):
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
def leave_nothing(queries, who: gl.constexpr):
    """Leaves zeros as number 0."""
    deltas = queries[1]
    ROWS: gl.constexpr = deltas.shape[2]
    nothing = gl.zeros([HALF, ROWS], deltas.dtype, accumulator(ROWS))
    _leave(queries, nothing, nothing, 0, who, 0, 1)


@gluon.jit
def pass_on(
    queries, ds, ds_t, index, at, who: gl.constexpr, COLUMNS: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr
):
    """Leaves dS and dS_t of a part of tile `at`, which gets the number at + 1. Once a tile it adds what the tile before
    gives: first, if there is room for one tile."""
    SLOTS: gl.constexpr = _slots(queries[1])
    if SLOTS == 1 and PART == 0:
        _add(queries, index, at, who, COLUMNS)
    _leave(queries, ds, ds_t, at + 1, who, PART, PARTS)
    if SLOTS > 1 and PART == PARTS - 1:
        _add(queries, index, at, who, COLUMNS)


@gluon.jit
def finish(queries, index, at, who: gl.constexpr, COLUMNS: gl.constexpr):
    """Adds what the last of `at` tiles gives, and waits until nobody reads keys any more."""
    if at > 0:
        _add(queries, index, at, who, COLUMNS)
    done = queries[4]
    mbarrier.arrive(done.index(0), count=1)
    mbarrier.wait(done.index(0), 0)


@gluon.jit
def _leave(queries, ds, ds_t, at, who: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr):
    """Leaves this consumer's part of number `at` for both consumers."""
    deltas, ready, free = queries[1], queries[2], queries[3]
    SLOTS: gl.constexpr = _slots(deltas)
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
    """In flight: total + dS.T @ keys, or dS_t.T @ keys, of number `at`; `keys` are a chunk of all of them."""
    for half in gl.static_range(2):
        weights = deltas.index(at % _slots(deltas) * 4 + 2 * TANGENT + half + (at >> 30) + here()).permute((1, 0))
        rows = own_rows((keys,), half + here(), at)[0]
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
def _add(queries, index, at, who: gl.constexpr, COLUMNS: gl.constexpr):
    """Adds what number `at`, the tile `index` of all, gives to d_q / c and d_q_t / c: one chunk of each, the other
    consumer the other ones."""
    sums, deltas, ready, free, _done, k, k_t = queries
    SLOTS: gl.constexpr = _slots(deltas)
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
