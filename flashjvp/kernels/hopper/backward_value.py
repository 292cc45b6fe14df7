"""d_v and d_v_t of the keys that a program owns; MATH.md (1)-(6), (17), (20). Tiles are [keys, queries]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backward_key import only_seen
from .chunks import add_product, add_scores, by_tensor, chunks, complete, left_operands, zeros
from .packed_mask import load_words, where_allowed, words_by_queries
from .pipeline import (
    HALF,
    LSE,
    MU,
    accumulator,
    barriers,
    given,
    keep_above,
    of_keys,
    own_rows,
    produce,
    scale_of,
    statistic,
    streamed_rows,
    tiles_for,
    write,
)
from .scales import D_V


@gluon.jit
def _tile(accs, own, streamed, stats, words, passed, scale, row0, tile, who: gl.constexpr, CAUSAL: gl.constexpr):
    """Adds a tile's part of d_v and d_v_t."""
    acc_v, acc_v_t = accs
    k, k_t = own
    q, G, q_t, T = streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([HALF, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    s_t = add_scores(zero, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    lse = statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = only_seen(p, row0, tile, who, TILE)
    p = where_allowed(p, words, 0.0, TILE)
    weights = left_operands(p.to(q[0].dtype), q)
    keep_above(passed)
    acc_v_t = add_product(acc_v_t, weights, T)
    acc_v = add_product(acc_v, weights, G)
    mu = statistic(stats, MU, TILE)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    weights_t = left_operands((p * (s_t * scale - mu)).to(q[0].dtype), q)
    acc_v = add_product(acc_v, weights_t, T)
    return complete(acc_v + acc_v_t)


@gluon.jit
def _consume(
    shared, scale, M, N, who: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VARIES: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, own_tiles, ring, stats_ring, mask, factors, bars, place, walk = shared
    own_full, full, empty = bars
    batch, row0 = place[0], place[2]
    other_head, heads_shared, first, last, heads = walk
    ROWS: gl.constexpr = ring[0].shape[3]
    accs = zeros(own_tiles[: len(outs)])
    mbarrier.wait(own_full.index(0), 0)
    at = 0
    for member in range(heads_shared):
        bits = words_by_queries(mask, batch, other_head + member, heads, M, N, VARIES)
        for tile in range(first, last):
            stage = at % STAGES
            passed = (full.index(stage), (at // STAGES) & 1)
            words = load_words(bits, row0 + who * HALF, tile, ROWS)
            mbarrier.wait(passed[0], passed[1])
            own = by_tensor(own_rows(own_tiles, who, at), CHUNKS)
            streamed = by_tensor(streamed_rows(ring, stage), CHUNKS)
            acc = by_tensor(accs, CHUNKS)
            stats = stats_ring[0].index(stage)
            accs = _tile(acc, own, streamed, stats, words, passed, scale, row0, tile, who, CAUSAL)
            mbarrier.arrive(empty.index(stage), count=1)
            at += 1
    write(outs, accs, own_tiles, place, factors, who, CHUNKS, D_V, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_value_kernel(
    k, k_rest, k_t, k_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats, d_v, d_v_rest, d_v_t, d_v_t_rest,
    mask, factors, scale, M, N, heads, group, CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one.
    """
    own = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest)
    outs = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    CHUNKS: gl.constexpr = len(own) // 2
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_launch_dependents()
    scale = scale_of(factors, scale)
    place, walk = of_keys(M, N, heads, group, ROWS, CAUSAL)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    stats_ring = tiles_for((stats,), STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    shared = (outs, own_tiles, ring, stats_ring, given(mask), given(factors), bars, place, walk)
    gl.warp_specialize(
        [
            (produce, (own, streamed, (stats,), own_tiles, ring, stats_ring, bars, place, walk, CHUNKS, STAGES)),
            (_consume, (shared, scale, M, N, 0, CHUNKS, STAGES, CAUSAL, VARIES)),
            (_consume, (shared, scale, M, N, 1, CHUNKS, STAGES, CAUSAL, VARIES)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
