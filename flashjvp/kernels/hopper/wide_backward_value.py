"""The kernel of d_v and d_v_t at head dims above 128, of 64 resident keys, streaming over query tiles; MATH.md (1)-(6),
(17), (20).

As in backward_value.py, but for the layout (wide_pipeline.py). q and q_t are the first tiles, G and T the second. Tiles
are [keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import CONSUMER_ROWS, key_block, where_causal
from .chunks import add_product, add_scores, chunks, complete
from .pipeline import LSE, MU, Program, accumulator, keep_above, row_statistic
from .results import store_results
from .scales import D_V
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
    """Adds what a tile gives to d_v and d_v_t."""
    acc_v, acc_v_t = accs
    k, k_t = inputs.resident
    q, q_t = inputs.first
    G, T = inputs.second
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS, WARPS)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    s_t = add_scores(zero, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    await_second(inputs)
    lse = row_statistic(inputs.stats, LSE, TILE)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = gl.exp2(s * (program.scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = where_causal(p, program.block.row0, tile, 0, TILE)
    weights = shared_operands(p.to(q[0].dtype), inputs.weights, 0, q)
    keep_above(inputs.second_full)
    acc_v_t = add_product(acc_v_t, weights, T)
    acc_v = add_product(acc_v, weights, G)
    mu = row_statistic(inputs.stats, MU, TILE)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    release_first(inputs)
    weights_t = shared_operands((p * (s_t * program.scale - mu)).to(q[0].dtype), inputs.weights, 1, q)
    acc_v = add_product(acc_v, weights_t, T)
    return complete(acc_v + acc_v_t)


@gluon.jit
def _consume(program, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr):
    """The consumer: the gradients of 64 keys."""
    accs = stream_queries_wide(_tile, begin_wide(program), program, CHUNKS, CAUSAL)
    store_results(program, accs, 0, CHUNKS, D_V, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_backward_value_kernel(
    k, k_rest, k_t, k_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats, d_v, d_v_rest, d_v_t, d_v_t_rest,
    scale, M, N, heads, group, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one.
    """
    resident = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    first = chunks(q, q_rest) + chunks(q_t, q_t_rest)
    second = chunks(G, G_rest) + chunks(T, T_rest)
    outs = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    CHUNKS: gl.constexpr = len(outs) // 2
    ROWS: gl.constexpr = q.block_shape[2]
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
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
