"""The kernel of d_v and d_v_t of the resident keys, streaming over query tiles; MATH.md (1)-(6), (17), (20).

It serves head dims whose d_k kernel has no registers for d_v. Tiles are [keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import CONSUMER_ROWS, key_block, where_causal
from .chunks import add_product, add_scores, by_tensor, chunks, complete, left_operands, zeros
from .packed_mask import load_mask_tile, packed_by_query, where_allowed
from .pipeline import (
    LSE,
    MU,
    accumulator,
    allocate_pipeline,
    keep_above,
    optional,
    produce,
    resident_rows,
    row_statistic,
    softmax_scale_of,
    streamed_rows,
)
from .results import store_results
from .scales import D_V


@gluon.jit
def _tile(
    accs, resident, streamed, stats, mask_tile, passed, scale, row0, tile, consumer: gl.constexpr, CAUSAL: gl.constexpr
):
    """Adds what a tile gives to d_v and d_v_t."""
    acc_v, acc_v_t = accs
    k, k_t = resident
    q, G, q_t, T = streamed  # mutate: q, G, q_t, T
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    s_t = add_scores(zero, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    lse = row_statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = where_causal(p, row0, tile, consumer, TILE)
    p = where_allowed(p, mask_tile, 0.0, TILE)
    weights = left_operands(p.to(q[0].dtype), q)
    keep_above(passed)
    acc_v_t = add_product(acc_v_t, weights, T)
    acc_v = add_product(acc_v, weights, G)
    mu = row_statistic(stats, MU, TILE)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    weights_t = left_operands((p * (s_t * scale - mu)).to(q[0].dtype), q)  # mutate: weights_t
    acc_v = add_product(acc_v, weights_t, T)
    return complete(acc_v + acc_v_t)


@gluon.jit
def _consume(
    shared, scale, M, N, consumer: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VARIES: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, resident_tiles, pipeline, stats_pipeline, mask, tensor_scales, barriers, block, loop = shared
    resident_full, full, empty = barriers
    batch, row0 = block[0], block[2]
    streamed_head, streamed_heads, first, last, heads = loop
    ROWS: gl.constexpr = pipeline[0].shape[3]
    accs = zeros(resident_tiles[: len(outs)])
    mbarrier.wait(resident_full.index(0), 0)
    iteration = 0
    for member in range(streamed_heads):
        packed_mask = packed_by_query(mask, batch, streamed_head + member, heads, M, N, VARIES)
        for tile in range(first, last):
            stage = iteration % STAGES
            passed = (full.index(stage), (iteration // STAGES) & 1)
            mask_tile = load_mask_tile(packed_mask, row0 + consumer * CONSUMER_ROWS, tile, ROWS)
            mbarrier.wait(passed[0], passed[1])
            resident = by_tensor(resident_rows(resident_tiles, consumer, iteration), CHUNKS)
            streamed = by_tensor(streamed_rows(pipeline, stage), CHUNKS)
            acc = by_tensor(accs, CHUNKS)
            stats = stats_pipeline[0].index(stage)
            accs = _tile(acc, resident, streamed, stats, mask_tile, passed, scale, row0, tile, consumer, CAUSAL)
            mbarrier.arrive(empty.index(stage), count=1)
            iteration += 1
    store_results(outs, accs, resident_tiles, block, tensor_scales, consumer, CHUNKS, D_V, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_value_kernel(
    k, k_rest, k_t, k_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats, d_v, d_v_rest, d_v_t, d_v_t_rest,
    mask, tensor_scales, scale, M, N, heads, group, CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one.
    """
    resident = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest)
    outs = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    CHUNKS: gl.constexpr = len(resident) // 2
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL)
    tiles, barriers = allocate_pipeline(resident, streamed, (stats,), STAGES)
    fence_async_shared()
    copies = (resident, streamed, (stats,)) + tiles + (barriers, block, loop)
    shared = (outs,) + tiles + (optional(mask), optional(tensor_scales), barriers, block, loop)
    gl.warp_specialize(
        [
            (produce, copies + (CHUNKS, STAGES)),
            (_consume, (shared, scale, M, N, 0, CHUNKS, STAGES, CAUSAL, VARIES)),
            (_consume, (shared, scale, M, N, 1, CHUNKS, STAGES, CAUSAL, VARIES)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
