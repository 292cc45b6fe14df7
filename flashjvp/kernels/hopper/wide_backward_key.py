"""The kernel of d_k and d_k_t at head dims above 128, of 64 resident keys, streaming over query tiles; MATH.md (1)-(6),
(9)-(14), (16), (19).

As in backward_key.py, but for the layout (wide_pipeline.py) and the order: A and B come first, from G and T, so that the
next tile's can land while S, S_t and the gradients are computed from q and q_t. Tiles are [keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import CONSUMER_ROWS, key_block, where_causal
from .chunks import add_product, add_scores, chunks, complete, scaled
from .pipeline import LSE, MU, ROW_A, ROW_DELTA, Program, accumulator, keep_above, row_statistic
from .results import store_results
from .scales import D_K
from .wide_pipeline import (
    WARPS,
    allocate_wide_pipeline,
    await_second,
    begin_wide,
    produce_wide,
    release_first,
    shared_operands,
    stream_queries_wide,
)


@gluon.jit
def _tile(accs, inputs, program, tile, CAUSAL: gl.constexpr):
    """Adds what a tile gives to d_k / c and d_k_t / c."""
    acc_k, acc_k_t = accs
    k, v, k_t, v_t = inputs.resident
    G, T = inputs.first
    q, q_t = inputs.second
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS, WARPS)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    a = add_scores(zero, v, T, USE_ACC=False)
    b = add_scores(zero, v, G, USE_ACC=False)
    b = add_scores(b, v_t, T)
    await_second(inputs)
    s = add_scores(zero, k, q, USE_ACC=False)
    s_t = add_scores(zero, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    lse = row_statistic(inputs.stats, LSE, TILE)
    row_a = row_statistic(inputs.stats, ROW_A, TILE)
    delta = row_statistic(inputs.stats, ROW_DELTA, TILE)
    a, b = warpgroup_mma_wait(3 * CHUNKS, deps=[a, b])
    release_first(inputs)
    centred = a - row_a
    b = b - delta
    keep_above(inputs.second_full)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = gl.exp2(s * (program.scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = where_causal(p, program.block.row0, tile, 0, TILE)
    weights_t = shared_operands((p * centred).to(q[0].dtype), inputs.weights, 0, q)
    keep_above(inputs.second_full)
    acc_k = add_product(acc_k, weights_t, q_t)
    acc_k_t = add_product(acc_k_t, weights_t, q)
    mu = row_statistic(inputs.stats, MU, TILE)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    weights = shared_operands((p * ((s_t * program.scale - mu) * centred + b)).to(q[0].dtype), inputs.weights, 1, q)
    acc_k = add_product(acc_k, weights, q)
    return complete(acc_k + acc_k_t)


@gluon.jit
def _consume(program, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr):
    """The consumer: the gradients of 64 keys."""
    accs = stream_queries_wide(_tile, begin_wide(program), program, CHUNKS, CAUSAL)
    store_results(program, scaled(accs, program.scale), 0, CHUNKS, D_K, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_backward_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_k_t, d_k_t_rest, scale, M, N, heads, group, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one.
    """
    resident = chunks(k, k_rest) + chunks(v, v_rest) + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
    first = chunks(G, G_rest) + chunks(T, T_rest)
    second = chunks(q, q_rest) + chunks(q_t, q_t_rest)
    outs = chunks(d_k, d_k_rest) + chunks(d_k_t, d_k_t_rest)
    CHUNKS: gl.constexpr = len(outs) // 2
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL, 1)
    pipeline = allocate_wide_pipeline(resident, first, second, (stats,), STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, (), (), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce_wide, (resident, first, second, (stats,), pipeline, block, loop, CHUNKS)),
            (_consume, (program, CHUNKS, CAUSAL)),
        ],
        [8],
        [240],
    )
