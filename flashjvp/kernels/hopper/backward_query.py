"""d_q and d_q_t of the queries that a program owns, without sums in global memory: bit-reproducible; MATH.md (1)-(6),
(9)-(15), (18). Tiles are [queries, keys].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .chunks import add_product, add_scores, by_tensor, chunks, complete, left_operands, scaled, zeros
from .packed_mask import load_words, where_allowed, words_by_keys
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
    held_rows,
    keep_above,
    of_queries,
    own_rows,
    produce,
    scale_of,
    streamed_rows,
    tiles_for,
    where_seen,
    whole_tiles,
    write,
)
from .scales import D_Q


@gluon.jit
def _row_statistic(stats, head, padded, rows, which: gl.constexpr):
    """[64, 1] of the statistics [heads of all batches, 4, padded rows]."""
    return gl.load(stats + (head * STATISTICS + which) * padded + rows)[:, None]


@gluon.jit
def _plain_tile(
    acc, own, streamed, rows, words, passed, scale, row0, tile, N, CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """Adds a tile's part of d_q / c, without tangents."""
    q, G = own
    k, v = streamed
    lse, delta = rows[0], rows[3]
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    b = add_scores(zero, G, v, USE_ACC=False)
    s = warpgroup_mma_wait(CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if MASKED:
        p = where_seen(p, 0.0, row0, tile, N, TILE, CAUSAL)
    p = where_allowed(p, words, 0.0, TILE)
    keep_above(passed)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = left_operands((p * (b - delta)).to(k[0].dtype), k)
    return complete(add_product(acc[0], ds, k))


@gluon.jit
def _tangent_tile(
    acc, own, streamed, rows, words, passed, scale, row0, tile, N, CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """Adds a tile's part of d_q / c and d_q_t / c."""
    acc_q, acc_q_t = acc
    q, G, q_t, T = own
    k, v, k_t, v_t = streamed
    lse, mu, row_a, delta = rows
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    a = add_scores(zero, T, v, USE_ACC=False)
    s_t = add_scores(zero, q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)
    s = warpgroup_mma_wait(3 * CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if MASKED:
        p = where_seen(p, 0.0, row0, tile, N, TILE, CAUSAL)
    p = where_allowed(p, words, 0.0, TILE)
    keep_above(passed)
    a = warpgroup_mma_wait(2 * CHUNKS, deps=[a])
    centred = a - row_a
    ds_t = left_operands((p * centred).to(k[0].dtype), k)
    keep_above(passed)
    acc_q_t = add_product(acc_q_t, ds_t, k)
    acc_q = add_product(acc_q, ds_t, k_t)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    b = (s_t * scale - mu) * centred - delta
    b = add_scores(b, G, v)
    b = add_scores(b, T, v_t)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = left_operands((p * b).to(k[0].dtype), k)
    acc_q = add_product(acc_q, ds, k)
    return complete(acc_q + acc_q_t)


@gluon.jit
def _walk(
    accs, shared, scale, row0, N, first, last, who: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Adds the tiles from `first` to `last`; MASKED if some of their keys are."""
    held, own_tiles, ring, rows, full, empty, bits = shared
    KEYS: gl.constexpr = ring[0].shape[3]
    row = row0 + who * HALF
    for tile in range(first, last):
        stage = tile % STAGES
        passed = (full.index(stage), (tile // STAGES) & 1)
        words = load_words(bits, row, tile, KEYS)
        mbarrier.wait(passed[0], passed[1])
        own = by_tensor(held + own_rows(own_tiles[len(held) :], who, tile), CHUNKS)
        streamed = by_tensor(streamed_rows(ring, stage), CHUNKS)
        acc = by_tensor(accs, CHUNKS)
        if len(own) == 2:
            accs = _plain_tile(acc, own, streamed, rows, words, passed, scale, row, tile, N, CAUSAL, MASKED)
        else:
            accs = _tangent_tile(acc, own, streamed, rows, words, passed, scale, row, tile, N, CAUSAL, MASKED)
        mbarrier.arrive(empty.index(stage), count=1)
    return accs


@gluon.jit
def _consume(
    shared, scale, M, N, who: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HELD: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 queries."""
    outs, own_tiles, ring, stats, bits, factors, bars, place, walk = shared
    own_full, full, empty = bars
    batch, own_head, row0 = place
    last, heads = walk[3], walk[4]
    KEYS: gl.constexpr = ring[0].shape[3]
    TILE: gl.constexpr = accumulator(KEYS)
    numbers = row0 + who * HALF + gl.arange(0, HALF, gl.SliceLayout(1, TILE))
    head = batch.to(gl.int64) * heads + own_head
    padded = gl.cdiv(M, 2 * HALF) * (2 * HALF)
    rows = (
        _row_statistic(stats, head, padded, numbers, LSE),
        _row_statistic(stats, head, padded, numbers, MU),
        _row_statistic(stats, head, padded, numbers, ROW_A),
        _row_statistic(stats, head, padded, numbers, ROW_DELTA),
    )
    accs = zeros(own_tiles[: len(outs)])
    mbarrier.wait(own_full.index(0), 0)
    held = held_rows(own_tiles[: HELD * CHUNKS], who, KEYS)
    whole = whole_tiles(row0 + who * HALF, N, last, KEYS, CAUSAL)
    shared = (held, own_tiles, ring, rows, full, empty, bits)
    accs = _walk(accs, shared, scale, row0, N, 0, whole, who, CHUNKS, STAGES, CAUSAL, False)
    accs = _walk(accs, shared, scale, row0, N, whole, last, who, CHUNKS, STAGES, CAUSAL, True)
    write(outs, scaled(accs, scale), own_tiles, place, factors, who, CHUNKS, D_Q, 1)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_query_kernel(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, stats,
    d_q, d_q_rest, d_q_t, d_q_t_rest, mask, factors, scale, M, N, heads, group,
    JVP: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head against all keys. `stats` cover whole programs, rows beyond the end, too.

    A `_rest` is a tensor's second chunk, if it has one.
    """
    own = chunks(q, q_rest) + chunks(G, G_rest)
    streamed = chunks(k, k_rest) + chunks(v, v_rest)
    outs = chunks(d_q, d_q_rest)
    CHUNKS: gl.constexpr = len(outs)
    if JVP:
        own = own + chunks(q_t, q_t_rest) + chunks(T, T_rest)
        streamed = streamed + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        outs = outs + chunks(d_q_t, d_q_t_rest)
    KEYS: gl.constexpr = k.block_shape[2]
    gdc_launch_dependents()
    scale = scale_of(factors, scale)
    place, walk = of_queries(M, N, heads, group, KEYS, CAUSAL)
    bits = words_by_keys(mask, place[0], place[1], heads, M, N, VARIES)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    shared = (outs, own_tiles, ring, stats, bits, given(factors), bars, place, walk)
    gl.warp_specialize(
        [
            (produce, (own, streamed, (), own_tiles, ring, (), bars, place, walk, CHUNKS, STAGES)),
            (_consume, (shared, scale, M, N, 0, CHUNKS, STAGES, CAUSAL, HELD)),
            (_consume, (shared, scale, M, N, 1, CHUNKS, STAGES, CAUSAL, HELD)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
