"""d_k, d_k_t of the keys that a program owns and, in the same pass, d_v, d_v_t and its part of d_q, d_q_t; MATH.md
(1)-(6), (9)-(20).

Tiles are [keys, queries]. Of the query gradients a program has one part for every tile of queries: both consumers leave
dS and dS_t of their keys in shared memory, and a tile later, when the other one has, too, add their products with all
keys to float32 sums in global memory, in any order.
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

from .ring import (
    HALF,
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    accumulator,
    barriers,
    keep_above,
    left_operand,
    of_keys,
    own_rows,
    produce,
    rows_of,
    statistic,
    streamed_rows,
    tiles_for,
    write,
)


@gluon.jit
def _add_query_sum(sums, deltas, own_tiles, offset, at, who: gl.constexpr, which: gl.constexpr):
    """Adds d_q / c (which = 0) or d_q_t / c (1), transposed: [D, rows]; (15), (18)."""
    ROWS: gl.constexpr = deltas[0].shape[2]
    LAYOUT: gl.constexpr = accumulator(ROWS)
    D: gl.constexpr = own_tiles[0].shape[4]
    total = gl.zeros([HALF, ROWS], gl.float32, LAYOUT)
    for i in gl.static_range(len(deltas) - which):  # k with dS, k_t with dS_t; or k with dS_t
        for half in gl.static_range(2):
            x = own_rows((own_tiles[2 * i],), half, at)[0]
            if D == 2 * HALF:
                x = x.slice(who * HALF, HALF, 1)
            ds = deltas[i + which].index((at % 2) * 2 + half)
            total = warpgroup_mma(x.permute((1, 0)), ds, total, use_acc=i + half > 0, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    row = gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.atomic_add(sums[which] + offset + (row * ROWS + column), total, sem="relaxed")


@gluon.jit
def _add_queries(sums, deltas, own_tiles, sync, index, at, who: gl.constexpr):
    """Adds what all keys of the program contribute to the query gradients of the streamed tile with number `index`.

    A consumer has half of a head dim of 128; of a narrower one it has d_q and d_q_t in turn.
    """
    ready, free = sync[0], sync[1]
    ROWS: gl.constexpr = deltas[0].shape[2]
    D: gl.constexpr = own_tiles[0].shape[4]
    slot = at % 2
    mbarrier.wait(ready.index(slot), (at // 2) & 1)
    if D == 2 * HALF:
        offset = index * (D * ROWS) + who * HALF * ROWS
        for which in gl.static_range(len(sums)):
            _add_query_sum(sums, deltas, own_tiles, offset, at, who, which)
    else:
        offset = index * (D * ROWS)
        if (at + who) % 2 == 0:
            _add_query_sum(sums, deltas, own_tiles, offset, at, who, 0)
        else:
            if len(sums) == 2:
                _add_query_sum(sums, deltas, own_tiles, offset, at, who, 1)
    mbarrier.arrive(free.index(slot), count=1)


@gluon.jit
def only_seen(p, row0, tile, who: gl.constexpr, LAYOUT: gl.constexpr):
    """P where a query, a column of the tile, may see the key, a row; 0 elsewhere."""
    ROWS: gl.constexpr = p.shape[1]
    if tile * ROWS < row0 + 2 * HALF:
        key = row0 + who * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))[:, None]
        query = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))[None, :]
        p = gl.where(key <= query, p, 0.0)
    return p


@gluon.jit
def _plain_tile(
    accs, inputs, scale, row0, tile, at, who: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
    VALUES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Adds a tile's part of d_k / c and d_v, without tangents."""
    own, streamed, stats, deltas, sync, passed = inputs
    k, v = own
    acc_k = accs[0]
    q, G = streamed
    ROWS: gl.constexpr = q.shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    WEIGHTS: gl.constexpr = left_operand(D)
    zero = gl.zeros([HALF, ROWS], gl.float32, TILE)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    b = warpgroup_mma(v, G.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = only_seen(p, row0, tile, who, TILE)
    keep_above(passed)
    if VALUES:
        acc_v = warpgroup_mma(gl.convert_layout(p.to(q.dtype), WEIGHTS), G, accs[1], is_async=True)
    delta = statistic(stats, ROW_DELTA, TILE)
    b = warpgroup_mma_wait(1 if VALUES else 0, deps=[b])
    ds = (p * (b - delta)).to(q.dtype)
    acc_k = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), q, acc_k, is_async=True)
    if QUERIES:
        mbarrier.wait(sync[1].index(at % 2), ((at // 2) & 1) ^ 1)
        deltas[0].index((at % 2) * 2 + who).store(ds)
        fence_async_shared()
        mbarrier.arrive(sync[0].index(at % 2), count=1)
    if VALUES:
        acc_k, acc_v = warpgroup_mma_wait(0, deps=[acc_k, acc_v])
        accs = (acc_k, acc_v)
    else:
        accs = (warpgroup_mma_wait(0, deps=[acc_k]),)
    return accs


@gluon.jit
def _tangent_tile(
    accs, inputs, scale, row0, tile, at, who: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
    VALUES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Adds a tile's part of d_k / c, d_v, d_k_t / c and d_v_t."""
    own, streamed, stats, deltas, sync, passed = inputs
    k, v, k_t, v_t = own
    if VALUES:
        acc_k, acc_v, acc_k_t, acc_v_t = accs
    else:
        acc_k, acc_k_t = accs
    q, G, q_t, T = streamed
    ROWS: gl.constexpr = q.shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    WEIGHTS: gl.constexpr = left_operand(D)
    # Products with P and dS_t that are in flight while S_t and B are waited for.
    OF_P: gl.constexpr = 2 if VALUES else 0
    zero = gl.zeros([HALF, ROWS], gl.float32, TILE)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    a = warpgroup_mma(v, T.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(k_t, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(k, q_t.permute((1, 0)), s_t, is_async=True)
    lse = statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(3, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = only_seen(p, row0, tile, who, TILE)
    keep_above(passed)
    if VALUES:
        weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
        acc_v_t = warpgroup_mma(weights, T, acc_v_t, is_async=True)
        acc_v = warpgroup_mma(weights, G, acc_v, is_async=True)
    row_a = statistic(stats, ROW_A, TILE)
    a = warpgroup_mma_wait(2 + OF_P, deps=[a])
    centred = a - row_a
    ds_t = (p * centred).to(q.dtype)
    weights_t = gl.convert_layout(ds_t, WEIGHTS)
    keep_above(passed)
    acc_k_t = warpgroup_mma(weights_t, q, acc_k_t, is_async=True)
    acc_k = warpgroup_mma(weights_t, q_t, acc_k, is_async=True)
    if QUERIES:
        mbarrier.wait(sync[1].index(at % 2), ((at // 2) & 1) ^ 1)
        deltas[1].index((at % 2) * 2 + who).store(ds_t)
    mu = statistic(stats, MU, TILE)
    delta = statistic(stats, ROW_DELTA, TILE)
    s_t = warpgroup_mma_wait(2 + OF_P, deps=[s_t])
    s_t = s_t * scale - mu
    if VALUES:
        weights_p = gl.convert_layout((p * s_t).to(q.dtype), WEIGHTS)
        acc_v = warpgroup_mma(weights_p, T, acc_v, is_async=True)
    b = s_t * centred - delta
    b = warpgroup_mma(v, G.permute((1, 0)), b, is_async=True)
    b = warpgroup_mma(v_t, T.permute((1, 0)), b, is_async=True)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = (p * b).to(q.dtype)
    acc_k = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), q, acc_k, is_async=True)
    if QUERIES:
        deltas[0].index((at % 2) * 2 + who).store(ds)
        fence_async_shared()
        mbarrier.arrive(sync[0].index(at % 2), count=1)
    if VALUES:
        accs = warpgroup_mma_wait(0, deps=[acc_k, acc_v, acc_k_t, acc_v_t])
    else:
        accs = warpgroup_mma_wait(0, deps=[acc_k, acc_k_t])
    return accs


@gluon.jit
def _consume(
    shared, scale, who: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, VALUES: gl.constexpr,
    QUERIES: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, sums, deltas, own_tiles, ring, stats_ring, bars, sync, place, walk = shared
    own_full, full, empty = bars
    batch, row0 = place[0], place[2]
    other_head, heads_shared, first, last, heads = walk
    D: gl.constexpr = ring[0].shape[4]
    ACC: gl.constexpr = accumulator(D)
    accs = ()
    for i in gl.static_range(len(own_tiles)):
        if VALUES or i % 2 == 0:
            accs = accs + (gl.zeros([HALF, D], gl.float32, ACC),)
    mbarrier.wait(own_full.index(0), 0)
    held = ()
    for i in gl.static_range(HELD):
        held = held + (rows_of(own_tiles[i].index(who)).load(left_operand(ring[0].shape[3])),)
    at = 0
    index = batch.to(gl.int64)
    for member in range(heads_shared):
        for tile in range(first, last):
            stage = at % STAGES
            passed = (full.index(stage), (at // STAGES) & 1)
            mbarrier.wait(passed[0], passed[1])
            own = held + own_rows(own_tiles[HELD:], who, at)
            streamed = streamed_rows(ring, stage)
            stats = stats_ring[0].index(stage)
            inputs = (own, streamed, stats, deltas, sync, passed)
            if len(own_tiles) == 2:
                accs = _plain_tile(accs, inputs, scale, row0, tile, at, who, D, CAUSAL, VALUES, QUERIES)
            else:
                accs = _tangent_tile(accs, inputs, scale, row0, tile, at, who, D, CAUSAL, VALUES, QUERIES)
            mbarrier.arrive(empty.index(stage), count=1)
            if QUERIES:
                if at > 0:
                    _add_queries(sums, deltas, own_tiles, sync, index, at - 1, who)
                index = (batch.to(gl.int64) * heads + other_head + member) * last + tile
            at += 1
    if QUERIES:
        if at > 0:
            _add_queries(sums, deltas, own_tiles, sync, index, at - 1, who)
        # The other consumer may still read this one's keys.
        mbarrier.arrive(sync[2].index(0), count=1)
        mbarrier.wait(sync[2].index(0), 0)
    for i in gl.static_range(len(accs)):
        if VALUES and i % 2 == 1:
            write(outs[i], accs[i], own_tiles[i].index(who), place, who)
        else:
            write(outs[i], accs[i] * scale, own_tiles[i].index(who), place, who)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_key_kernel(
    k, v, k_t, v_t, q, G, q_t, T, stats, d_k, d_v, d_k_t, d_v_t, d_q, d_q_t, scale, M, N, heads, group,
    JVP: gl.constexpr, VALUES: gl.constexpr, QUERIES: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads; d_q, d_q_t are sums, [D, rows] a tile."""
    own = (k, v)
    streamed = (q, G)
    outs = (d_k, d_v) if VALUES else (d_k,)
    sums = (d_q,) if QUERIES else ()
    if JVP:
        own = own + (k_t, v_t)
        streamed = streamed + (q_t, T)
        outs = outs + ((d_k_t, d_v_t) if VALUES else (d_k_t,))
        sums = sums + ((d_q_t,) if QUERIES else ())
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    place, walk = of_keys(M, N, heads, group, ROWS, CAUSAL)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    stats_ring = tiles_for((stats,), STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    deltas = ()
    if QUERIES:
        DELTA: gl.constexpr = gl.NVMMASharedLayout(ROWS * 2, 16)
        for _i in gl.static_range(len(sums)):
            deltas = deltas + (gl.allocate_shared_memory(q.dtype, [4, HALF, ROWS], DELTA),)
    sync = (barriers(2, 2), barriers(2, 2), barriers(1, 2))
    fence_async_shared()
    shared = (outs, sums, deltas, own_tiles, ring, stats_ring, bars, sync, place, walk)
    gl.warp_specialize(
        [
            (_consume, (shared, scale, 0, STAGES, CAUSAL, VALUES, QUERIES, HELD)),
            (_consume, (shared, scale, 1, STAGES, CAUSAL, VALUES, QUERIES, HELD)),
            (produce, (own, streamed, (stats,), own_tiles, ring, stats_ring, bars, place, walk, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
