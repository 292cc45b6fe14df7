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

from .chunks import add_product, add_scores, by_tensor, chunks, complete, left_operands, zeros
from .ring import (
    HALF,
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    accumulator,
    barriers,
    held_rows,
    keep_above,
    of_keys,
    own_rows,
    produce,
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
    accs, inputs, scale, row0, tile, at, who: gl.constexpr, CAUSAL: gl.constexpr, VALUES: gl.constexpr,
    QUERIES: gl.constexpr,
):  # fmt: skip
    """Adds a tile's part of d_k / c and d_v, without tangents."""
    own, streamed, stats, deltas, sync, passed = inputs
    k, v = own
    acc_k = accs[0]
    q, G = streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([HALF, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    b = add_scores(zero, v, G, USE_ACC=False)
    lse = statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = only_seen(p, row0, tile, who, TILE)
    keep_above(passed)
    if VALUES:
        acc_v = add_product(accs[1], left_operands(p.to(q[0].dtype), G), G)
    delta = statistic(stats, ROW_DELTA, TILE)
    b = warpgroup_mma_wait(CHUNKS if VALUES else 0, deps=[b])
    ds = (p * (b - delta)).to(q[0].dtype)
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    if QUERIES:
        mbarrier.wait(sync[1].index(at % 2), ((at // 2) & 1) ^ 1)
        deltas[0].index((at % 2) * 2 + who).store(ds)
        fence_async_shared()
        mbarrier.arrive(sync[0].index(at % 2), count=1)
    if VALUES:
        acc_k = acc_k + acc_v
    return complete(acc_k)


@gluon.jit
def _tangent_tile(
    accs, inputs, scale, row0, tile, at, who: gl.constexpr, CAUSAL: gl.constexpr, VALUES: gl.constexpr,
    QUERIES: gl.constexpr,
):  # fmt: skip
    """Adds a tile's part of d_k / c, d_v, d_k_t / c and d_v_t."""
    own, streamed, stats, deltas, sync, passed = inputs
    k, v, k_t, v_t = own
    if VALUES:
        acc_k, acc_v, acc_k_t, acc_v_t = accs
    else:
        acc_k, acc_k_t = accs
    q, G, q_t, T = streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    # Products with P and dS_t that are in flight while S_t and B are waited for.
    OF_P: gl.constexpr = 2 if VALUES else 0
    zero = gl.zeros([HALF, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    a = add_scores(zero, v, T, USE_ACC=False)
    s_t = add_scores(zero, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    lse = statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(3 * CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = only_seen(p, row0, tile, who, TILE)
    keep_above(passed)
    if VALUES:
        weights = left_operands(p.to(q[0].dtype), q)
        acc_v_t = add_product(acc_v_t, weights, T)
        acc_v = add_product(acc_v, weights, G)
    row_a = statistic(stats, ROW_A, TILE)
    a = warpgroup_mma_wait((2 + OF_P) * CHUNKS, deps=[a])
    centred = a - row_a
    ds_t = (p * centred).to(q[0].dtype)
    weights_t = left_operands(ds_t, q)
    keep_above(passed)
    acc_k_t = add_product(acc_k_t, weights_t, q)
    acc_k = add_product(acc_k, weights_t, q_t)
    if QUERIES:
        mbarrier.wait(sync[1].index(at % 2), ((at // 2) & 1) ^ 1)
        deltas[1].index((at % 2) * 2 + who).store(ds_t)
    if CHUNKS == 1:  # else there are no registers for them while S_t is awaited
        mu = statistic(stats, MU, TILE)
        delta = statistic(stats, ROW_DELTA, TILE)
    s_t = warpgroup_mma_wait((2 + OF_P) * CHUNKS, deps=[s_t])
    if CHUNKS > 1:
        mu = statistic(stats, MU, TILE)
        delta = statistic(stats, ROW_DELTA, TILE)
    s_t = s_t * scale - mu
    if VALUES:
        acc_v = add_product(acc_v, left_operands((p * s_t).to(q[0].dtype), q), T)
    b = s_t * centred - delta
    b = add_scores(b, v, G)
    b = add_scores(b, v_t, T)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = (p * b).to(q[0].dtype)
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    if QUERIES:
        deltas[0].index((at % 2) * 2 + who).store(ds)
        fence_async_shared()
        mbarrier.arrive(sync[0].index(at % 2), count=1)
    if VALUES:
        acc_k = acc_k + acc_v
        acc_k_t = acc_k_t + acc_v_t
    return complete(acc_k + acc_k_t)


@gluon.jit
def _consume(
    shared, scale, who: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VALUES: gl.constexpr, QUERIES: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, sums, deltas, own_tiles, ring, stats_ring, bars, sync, place, walk = shared
    own_full, full, empty = bars
    batch, row0 = place[0], place[2]
    other_head, heads_shared, first, last, heads = walk
    accs = zeros(outs)
    mbarrier.wait(own_full.index(0), 0)
    held = held_rows(own_tiles[: HELD * CHUNKS], who, ring[0].shape[3])
    at = 0
    index = batch.to(gl.int64)
    for member in range(heads_shared):
        for tile in range(first, last):
            stage = at % STAGES
            passed = (full.index(stage), (at // STAGES) & 1)
            mbarrier.wait(passed[0], passed[1])
            own = by_tensor(held + own_rows(own_tiles[len(held) :], who, at), CHUNKS)
            streamed = by_tensor(streamed_rows(ring, stage), CHUNKS)
            stats = stats_ring[0].index(stage)
            inputs = (own, streamed, stats, deltas, sync, passed)
            acc = by_tensor(accs, CHUNKS)
            if len(own) == 2:
                accs = _plain_tile(acc, inputs, scale, row0, tile, at, who, CAUSAL, VALUES, QUERIES)
            else:
                accs = _tangent_tile(acc, inputs, scale, row0, tile, at, who, CAUSAL, VALUES, QUERIES)
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
    grads = ()
    for i in gl.static_range(len(accs)):
        grads = grads + (accs[i] if VALUES and i // CHUNKS % 2 == 1 else accs[i] * scale,)
    write(outs, grads, own_tiles, place, who, CHUNKS)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, d_q, d_q_t, scale, M, N, heads, group,
    JVP: gl.constexpr, VALUES: gl.constexpr, QUERIES: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads; d_q, d_q_t are sums, [D, rows] a tile.

    A `_rest` is a tensor's second chunk, if it has one; then there are no QUERIES.
    """
    own = chunks(k, k_rest) + chunks(v, v_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest)
    outs = chunks(d_k, d_k_rest)
    sums = (d_q,) if QUERIES else ()
    CHUNKS: gl.constexpr = len(outs)
    gl.static_assert(CHUNKS == 1 or not QUERIES)
    if VALUES:
        outs = outs + chunks(d_v, d_v_rest)
    if JVP:
        own = own + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        streamed = streamed + chunks(q_t, q_t_rest) + chunks(T, T_rest)
        outs = outs + chunks(d_k_t, d_k_t_rest)
        if VALUES:
            outs = outs + chunks(d_v_t, d_v_t_rest)
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
            (_consume, (shared, scale, 0, CHUNKS, STAGES, CAUSAL, VALUES, QUERIES, HELD)),
            (_consume, (shared, scale, 1, CHUNKS, STAGES, CAUSAL, VALUES, QUERIES, HELD)),
            (produce, (own, streamed, (stats,), own_tiles, ring, stats_ring, bars, place, walk, CHUNKS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
