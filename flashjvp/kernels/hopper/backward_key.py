"""d_k, d_k_t of the keys that a program owns and, in the same pass, d_v, d_v_t or the sums of dq_accum.py; MATH.md
(1)-(6), (9)-(14), (16), (17), (19), (20). Tiles are [keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .chunks import add_product, add_scores, by_tensor, chunks, complete, left_operands, zeros
from .dq_accum import finish, leave_nothing, pass_on, room_for
from .packed_mask import load_words, where_allowed, words_by_queries
from .pipeline import (
    HALF,
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    accumulator,
    barriers,
    given,
    held_rows,
    keep_above,
    of_keys,
    own_rows,
    part_of_rows,
    produce,
    scale_of,
    statistic,
    streamed_rows,
    tiles_for,
    write,
)
from .scales import D_K


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
def _plain_tile(accs, inputs, scale, row0, tile, who: gl.constexpr, CAUSAL: gl.constexpr):
    """Adds a tile's part of d_k / c and d_v, without tangents."""
    own, streamed, stats, words, passed = inputs
    k, v = own
    acc_k, acc_v = accs
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
    p = where_allowed(p, words, 0.0, TILE)
    keep_above(passed)
    acc_v = add_product(acc_v, left_operands(p.to(q[0].dtype), G), G)
    delta = statistic(stats, ROW_DELTA, TILE)
    b = warpgroup_mma_wait(CHUNKS, deps=[b])
    ds = (p * (b - delta)).to(q[0].dtype)
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    return complete(acc_k + acc_v)


@gluon.jit
def _tangent_tile(
    accs, inputs, queries, index, scale, row0, part, at, who: gl.constexpr, CAUSAL: gl.constexpr,
    VALUES: gl.constexpr, QUERIES: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Adds what a part of tile `at` gives to d_k / c, d_v, d_k_t / c and d_v_t, and to `queries`. `part` is its number
    in the head, PART that in the tile; `index` is the number of the tile before in all heads."""
    own, streamed, stats, words, passed = inputs
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
        p = only_seen(p, row0, part, who, TILE)
    p = where_allowed(p, words, 0.0, TILE)
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
    acc_k = add_product(acc_k, weights_t, q_t)
    acc_k_t = add_product(acc_k_t, weights_t, q)
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
    if len(queries) > 0:
        pass_on(queries, ds, ds_t, index, at, who, QUERIES, PART, PARTS)
    if VALUES:
        acc_k = acc_k + acc_v
        acc_k_t = acc_k_t + acc_v_t
    return complete(acc_k + acc_k_t)


@gluon.jit
def _consume(
    shared, scale, M, N, who: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VALUES: gl.constexpr, QUERIES: gl.constexpr, HELD: gl.constexpr, PARTS: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, queries, own_tiles, ring, stats_ring, mask, factors, bars, place, walk = shared
    own_full, full, empty = bars
    batch, row0 = place[0], place[2]
    other_head, heads_shared, first, last, heads = walk
    ROWS: gl.constexpr = ring[0].shape[3]
    accs = zeros(own_tiles[: len(outs)])
    mbarrier.wait(own_full.index(0), 0)
    held = held_rows(own_tiles[: HELD * CHUNKS], who, ROWS // PARTS)
    at = 0
    index = (batch * heads + other_head) * last + first  # of the tile before, of which there is nothing yet
    if len(queries) > 0:
        leave_nothing(queries, who)
    for member in range(heads_shared):
        bits = words_by_queries(mask, batch, other_head + member, heads, M, N, VARIES)
        for tile in range(first, last):
            stage = at % STAGES
            passed = (full.index(stage), (at // STAGES) & 1)
            words = ()
            for i in gl.static_range(PARTS):
                words = words + (load_words(bits, row0 + who * HALF, tile * PARTS + i, ROWS // PARTS),)
            mbarrier.wait(passed[0], passed[1])
            own = by_tensor(held + own_rows(own_tiles[len(held) :], who, at), CHUNKS)
            for i in gl.static_range(PARTS):
                part = tile * PARTS + i
                streamed = by_tensor(part_of_rows(streamed_rows(ring, stage), i, PARTS), CHUNKS)
                stats = stats_ring[0].index(stage).slice(i * (ROWS // PARTS), ROWS // PARTS, 1)
                inputs = (own, streamed, stats, words[i], passed)
                acc = by_tensor(accs, CHUNKS)
                if len(own) == 2:
                    accs = _plain_tile(acc, inputs, scale, row0, part, who, CAUSAL)
                else:
                    accs = _tangent_tile(
                        acc, inputs, queries, index, scale, row0, part, at, who, CAUSAL, VALUES, QUERIES, i, PARTS
                    )
            mbarrier.arrive(empty.index(stage), count=1)
            if len(queries) > 0:
                index = (batch * heads + other_head + member) * last + tile
            at += 1
    if len(queries) > 0:
        finish(queries, index, at, who, QUERIES)
    grads = ()
    for i in gl.static_range(len(accs)):
        grads = grads + (accs[i] if VALUES and i // CHUNKS % 2 == 1 else accs[i] * scale,)
    write(outs, grads, own_tiles, place, factors, who, CHUNKS, D_K, 1 if VALUES else 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, d_q, d_q_t, mask, factors,
    scale, M, N, heads, group,
    JVP: gl.constexpr, VALUES: gl.constexpr, QUERIES: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    HELD: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one. QUERIES are the columns of d_q and d_q_t if these are sums of
    all programs, in an order that backward_preprocess.py knows, else 0.
    """
    own = chunks(k, k_rest) + chunks(v, v_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest)
    outs = chunks(d_k, d_k_rest)
    CHUNKS: gl.constexpr = len(outs)
    if VALUES:
        outs = outs + chunks(d_v, d_v_rest)
    if JVP:
        own = own + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        streamed = streamed + chunks(q_t, q_t_rest) + chunks(T, T_rest)
        outs = outs + chunks(d_k_t, d_k_t_rest)
        if VALUES:
            outs = outs + chunks(d_v_t, d_v_t_rest)
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    scale = scale_of(factors, scale)
    place, walk = of_keys(M, N, heads, group, ROWS, CAUSAL)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    stats_ring = tiles_for((stats,), STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    queries = ()
    if QUERIES > 0:
        queries = room_for((d_q, d_q_t), own_tiles[:CHUNKS], own_tiles[2 * CHUNKS : 3 * CHUNKS], ROWS, PARTS, SLOTS)
    fence_async_shared()
    shared = (outs, queries, own_tiles, ring, stats_ring, given(mask), given(factors), bars, place, walk)
    gl.warp_specialize(
        [
            (produce, (own, streamed, (stats,), own_tiles, ring, stats_ring, bars, place, walk, CHUNKS, STAGES)),
            (_consume, (shared, scale, M, N, 0, CHUNKS, STAGES, CAUSAL, VALUES, QUERIES, HELD, PARTS, VARIES)),
            (_consume, (shared, scale, M, N, 1, CHUNKS, STAGES, CAUSAL, VALUES, QUERIES, HELD, PARTS, VARIES)),
        ],
        [4, 4],
        [240, 240],
    )
