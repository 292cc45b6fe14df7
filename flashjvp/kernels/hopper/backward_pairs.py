"""d_k, d_k_t of the keys that a program owns, and its part of d_q, d_q_t, for a head dim of 128; MATH.md (1)-(6),
(9)-(16), (18), (19).

Tiles are [keys, queries]. The rows of q and q_t, and of T and G, lie one above the other in a tile: a product with such
a pair is two, and reads its left operand once. Of the query gradients a program has one part for every tile of queries:
both consumers leave dS and dS_t of their keys in shared memory, and a tile later, when the other one has, too, each
adds its half of the columns of the products with all keys to float32 sums in global memory, in any order. These
products come last in an iteration, when the registers of the scores are free again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backward_key import only_seen
from .dq_accum import add_to_sum
from .packed_mask import load_words, where_allowed, words_by_queries
from .pipeline import (
    HALF,
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    STATISTICS,
    accumulator,
    barriers,
    given,
    keep_above,
    left_operand,
    load_own,
    of_keys,
    own_rows,
    scale_of,
    statistic,
    streamed_rows,
    tiles_for,
    write,
)
from .scales import D_K
from .triton_compat import addressed_here, here, load_tile

SLOTS = gl.constexpr(2)  # of dS and dS_t


@gluon.jit
def _pairs_for(tensors, COUNT: gl.constexpr):
    """Room for COUNT tiles of each pair of tensors, which are copied in pieces of 64 columns."""
    found = ()
    for i in gl.static_range(len(tensors) // 2):
        x = tensors[2 * i]
        found = found + (gl.allocate_shared_memory(x.dtype, [COUNT, 1, 1, 2 * x.block_shape[2], 2 * HALF], x.layout),)
    return found


@gluon.jit
def _rows_of_pair(pair):
    """A pair's two tiles, [rows, D] each, addressed here."""
    ROWS: gl.constexpr = pair.shape[0] // 2
    pair = addressed_here(pair)
    return pair.slice(0, ROWS, 0), pair.slice(ROWS, ROWS, 0)


@gluon.jit
def _columns_of_pair(product):
    """What a product with a pair is for either of its tiles. A further product that adds to one of them needs registers
    of its own, or ptxas waits for every product of the kernel (C7511): add something to it first, if only 0.0."""
    ROWS: gl.constexpr = product.shape[1] // 2
    x, y = gl.split(product.reshape([HALF, 2, ROWS]).permute((0, 2, 1)))
    return gl.convert_layout(x, accumulator(ROWS)), gl.convert_layout(y, accumulator(ROWS))


@gluon.jit
def _produce(own, streamed, stats, own_tiles, ring, stats_ring, bars, place, walk, STAGES: gl.constexpr):
    """The producer: as `ring.produce`, but tiles of two tensors are copied into one."""
    own_full, full, empty = bars
    batch = place[0]
    other_head, heads_shared, first, last, heads = walk
    ROWS: gl.constexpr = streamed[0].block_shape[2]
    BYTES: gl.constexpr = len(streamed) * 2 * streamed[0].block_type.nbytes + STATISTICS * ROWS * 4
    load_own(own, own_tiles, own_full, place, 1)
    at = 0
    for member in range(heads_shared):
        head = other_head + member
        for tile in range(first, last):
            stage = at % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(len(streamed)):
                rows = ring[i // 2].index(stage).slice(i % 2 * ROWS, ROWS, 2)
                for piece in gl.static_range(2):
                    coordinates = [batch, head, tile * ROWS, piece * HALF]
                    load_tile(streamed[i], coordinates, bar, rows.slice(piece * HALF, HALF, 3))
            load_tile(stats, [(batch * heads + head) * STATISTICS, tile * ROWS], bar, stats_ring.index(stage))
            at += 1


@gluon.jit
def _with_deltas(keys, deltas, at, who: gl.constexpr, FIRST: gl.constexpr, COLUMNS: gl.constexpr):
    """In flight: this consumer's half of the rows of keys.T @ so many columns of [dS, dS_t] of the tile before."""
    total = gl.zeros([HALF, COLUMNS], gl.float32, accumulator(COLUMNS))
    for half in gl.static_range(2):
        x = own_rows((keys,), half + here(), at)[0].slice(who * HALF, HALF, 1)
        ds = deltas.index(at % SLOTS * 2 + half + (at >> 30) + here()).slice(FIRST, COLUMNS, 1)
        total = warpgroup_mma(x.permute((1, 0)), ds, total, use_acc=half > 0, is_async=True)
    return total


@gluon.jit
def _add_queries(queries, own_tiles, index, at, who: gl.constexpr):
    """Adds, of the tile before this one and transposed, d_q / c (15) and d_q_t / c (18)."""
    sums, deltas, ready, free = queries
    ROWS: gl.constexpr = deltas.shape[2] // 2
    mbarrier.wait(ready.index(at % SLOTS), (at // SLOTS) & 1)
    total = _with_deltas(own_tiles[0], deltas, at, who, 0, 2 * ROWS)
    rest = _with_deltas(own_tiles[2], deltas, at, who, ROWS, ROWS)
    total, total_t = _columns_of_pair(warpgroup_mma_wait(2, deps=[total]))
    place = (index.to(gl.int64) * 2 + who) * (HALF * ROWS)
    add_to_sum(sums[1] + place, total_t)
    rest = warpgroup_mma_wait(0, deps=[rest])
    mbarrier.arrive(free.index(at % SLOTS), count=1)
    add_to_sum(sums[0] + place, total + rest)


@gluon.jit
def _leave_deltas(queries, both, at, who: gl.constexpr):
    """Leaves [dS, dS_t] of this consumer's keys for both consumers; number 0 are zeros, and tile `at` has at + 1."""
    deltas, ready, free = queries[1], queries[2], queries[3]
    mbarrier.wait(free.index(at % SLOTS), (at // SLOTS & 1) ^ 1)
    deltas.index(at % SLOTS * 2 + who + (at >> 30)).store(both)
    fence_async_shared()
    mbarrier.arrive(ready.index(at % SLOTS), count=1)


@gluon.jit
def _tile(accs, inputs, queries, own_tiles, index, scale, row0, tile, at, who: gl.constexpr, CAUSAL: gl.constexpr):
    """Adds a tile's part of d_k / c and d_k_t / c, and what the tile before it adds to d_q / c and d_q_t / c."""
    own, streamed, stats, words, passed = inputs
    k, v, k_t, v_t = own
    acc_k, acc_k_t = accs
    q_and_q_t, T_and_G = streamed
    ROWS: gl.constexpr = q_and_q_t.shape[0] // 2
    TILE: gl.constexpr = accumulator(ROWS)
    WEIGHTS: gl.constexpr = left_operand(2 * HALF)
    zero = gl.zeros([HALF, 2 * ROWS], gl.float32, accumulator(2 * ROWS))
    s = warpgroup_mma(addressed_here(k), addressed_here(q_and_q_t).permute((1, 0)), zero, use_acc=False, is_async=True)
    a = warpgroup_mma(addressed_here(v), addressed_here(T_and_G).permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = statistic(stats, LSE, TILE)
    s, s_t = _columns_of_pair(warpgroup_mma_wait(1, deps=[s]))
    q, q_t = _rows_of_pair(q_and_q_t)
    s_t = warpgroup_mma(addressed_here(k_t), q.permute((1, 0)), s_t + 0.0, is_async=True)
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = only_seen(p, row0, tile, who, TILE)
    p = where_allowed(p, words, 0.0, TILE)
    keep_above(passed)
    row_a = statistic(stats, ROW_A, TILE)
    a, b = _columns_of_pair(warpgroup_mma_wait(1, deps=[a]))
    T = _rows_of_pair(T_and_G)[0]
    b = warpgroup_mma(addressed_here(v_t), T.permute((1, 0)), b - statistic(stats, ROW_DELTA, TILE), is_async=True)
    centred = a - row_a
    ds_t = (p * centred).to(q.dtype)
    weights_t = gl.convert_layout(ds_t, WEIGHTS)
    keep_above(passed)
    q, q_t = _rows_of_pair(q_and_q_t)
    acc_k_t = warpgroup_mma(weights_t, q, acc_k_t, is_async=True)
    acc_k = warpgroup_mma(weights_t, q_t, acc_k, is_async=True)
    mu = statistic(stats, MU, TILE)
    s_t = warpgroup_mma_wait(3, deps=[s_t])
    s_t = s_t * scale - mu
    b = warpgroup_mma_wait(2, deps=[b])
    ds = (p * (s_t * centred + b)).to(q.dtype)
    q, q_t = _rows_of_pair(q_and_q_t)
    acc_k = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), q, acc_k, is_async=True)
    if len(queries) > 0:
        both = gl.join(ds, ds_t).permute((0, 2, 1)).reshape([HALF, 2 * ROWS])
        _leave_deltas(queries, gl.convert_layout(both, accumulator(2 * ROWS)), at + 1, who)
        _add_queries(queries, own_tiles, index, at, who)
    return warpgroup_mma_wait(0, deps=[acc_k, acc_k_t])


@gluon.jit
def _consume(
    shared, queries, done, scale, M, N, who: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VARIES: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, own_tiles, ring, stats_ring, mask, factors, bars, place, walk = shared
    own_full, full, empty = bars
    batch, row0 = place[0], place[2]
    other_head, heads_shared, first, last, heads = walk
    zero = gl.zeros([HALF, 2 * HALF], gl.float32, accumulator(2 * HALF))
    accs = (zero, zero)
    mbarrier.wait(own_full.index(0), 0)
    at = 0
    index = (batch * heads + other_head) * last + first
    if len(queries) > 0:
        WIDTH: gl.constexpr = queries[1].shape[2]
        _leave_deltas(queries, gl.zeros([HALF, WIDTH], ring[0].dtype, accumulator(WIDTH)), at, who)
    for member in range(heads_shared):
        bits = words_by_queries(mask, batch, other_head + member, heads, M, N, VARIES)
        for tile in range(first, last):
            stage = at % STAGES
            passed = (full.index(stage), (at // STAGES) & 1)
            words = load_words(bits, row0 + who * HALF, tile, stats_ring.shape[2])
            mbarrier.wait(passed[0], passed[1])
            own = own_rows(own_tiles, who, at)
            inputs = (own, streamed_rows(ring, stage), stats_ring.index(stage), words, passed)
            accs = _tile(accs, inputs, queries, own_tiles, index, scale, row0, tile, at, who, CAUSAL)
            mbarrier.arrive(empty.index(stage), count=1)
            if len(queries) > 0:
                index = (batch * heads + other_head + member) * last + tile
            at += 1
    if len(queries) > 0:
        if at > 0:
            _add_queries(queries, own_tiles, index, at, who)
        # The other consumer may still read this one's keys.
        mbarrier.arrive(done.index(0), count=1)
        mbarrier.wait(done.index(0), 0)
    write(outs, (accs[0] * scale, accs[1] * scale), own_tiles, place, factors, who, 1, D_K, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_pairs_kernel(
    k, v, k_t, v_t, q, q_t, T, G, stats, d_k, d_k_t, d_q, d_q_t, mask, factors, scale, M, N, heads, group,
    QUERIES: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads; with QUERIES, d_q and d_q_t are sums, in
    an order that backward_preprocess.py knows."""
    ROWS: gl.constexpr = q.block_shape[2]
    own = (k, v, k_t, v_t)
    streamed = (q, q_t, T, G)
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    scale = scale_of(factors, scale)
    place, walk = of_keys(M, N, heads, group, ROWS, CAUSAL)
    own_tiles = tiles_for(own, 2)
    ring = _pairs_for(streamed, STAGES)
    stats_ring = tiles_for((stats,), STAGES)[0]
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    done = barriers(1, 2)
    queries = ()
    if QUERIES:
        DELTA: gl.constexpr = gl.NVMMASharedLayout(2 * ROWS, 16)
        deltas = gl.allocate_shared_memory(q.dtype, [2 * SLOTS, HALF, 2 * ROWS], DELTA)
        queries = ((d_q, d_q_t), deltas, barriers(SLOTS, 2), barriers(SLOTS, 2))
    fence_async_shared()
    shared = ((d_k, d_k_t), own_tiles, ring, stats_ring, given(mask), given(factors), bars, place, walk)
    gl.warp_specialize(
        [
            (_produce, (own, streamed, stats, own_tiles, ring, stats_ring, bars, place, walk, STAGES)),
            (_consume, (shared, queries, done, scale, M, N, 0, STAGES, CAUSAL, VARIES)),
            (_consume, (shared, queries, done, scale, M, N, 1, STAGES, CAUSAL, VARIES)),
        ],
        [4, 4],
        [240, 240],
    )
