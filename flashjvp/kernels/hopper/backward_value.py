"""The kernel of d_v and d_v_t of the resident keys, streaming over query tiles; MATH.md (1)-(6), (17), (20).

It serves head dims whose d_k kernel has no registers for d_v. Tiles are [keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bias import bias_operand, probabilities_of_keys
from .blocks import CONSUMER_ROWS, key_block, where_causal
from .chunks import add_product, add_scores, chunks, complete, left_operands
from .mainloop import begin, stream_queries
from .packed_mask import where_allowed
from .pipeline import (
    LSE,
    MU,
    Program,
    accumulator,
    allocate_pipeline,
    keep_above,
    optional,
    produce,
    row_statistic,
    softmax_scale_of,
)
from .results import store_results
from .scales import D_V


@gluon.jit
def _tile(accs, dq, inputs, program, at, consumer: gl.constexpr, CAUSAL: gl.constexpr, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_v and d_v_t."""
    acc_v, acc_v_t = accs
    k, k_t = inputs.resident
    q, G, q_t, T = inputs.streamed  # mutate: q, G, q_t, T
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    s_t = add_scores(zero, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    lse = row_statistic(inputs.stats, LSE, TILE)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = probabilities_of_keys(s, lse, program.scale, inputs.bias, inputs.passed, TILE)
    if CAUSAL:
        p = where_causal(p, at.tile, program, consumer, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    weights = left_operands(p.to(q[0].dtype), q)
    keep_above(inputs.passed)
    acc_v_t = add_product(acc_v_t, weights, T)
    acc_v = add_product(acc_v, weights, G)
    mu = row_statistic(inputs.stats, MU, TILE)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    weights_t = left_operands((p * (s_t * program.scale - mu)).to(q[0].dtype), q)  # mutate: weights_t
    acc_v = add_product(acc_v, weights_t, T)
    return complete(acc_v + acc_v_t)


@gluon.jit
def consume(
    program, consumer: gl.constexpr, CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
    stream: gl.constexpr = stream_queries,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    CHUNKS: gl.constexpr = len(program.outs) // 2
    like = program.pipeline.resident[: len(program.outs)]
    accs, register_operands = begin(program, consumer, like)
    accs, _before, _iteration = stream(
        _tile, accs, (), register_operands, program, consumer, CHUNKS, CAUSAL, VARIES, BIAS_LAYOUT
    )
    store_results(program, accs, consumer, CHUNKS, D_V, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_value_kernel(
    k, k_rest, k_t, k_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats, d_v, d_v_rest, d_v_t, d_v_t_rest,
    mask, bias, log_l, tensor_scales, scale, M, N, heads, group,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr,
    BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one.
    """
    resident = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest)
    outs = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    CHUNKS: gl.constexpr = len(resident) // 2
    ROWS: gl.constexpr = q.block_shape[-2]
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL)
    pipeline = allocate_pipeline(resident, streamed, (stats,), STAGES)
    fence_async_shared()
    program = Program(
        outs, pipeline, optional(mask), bias_operand(bias, log_l), optional(tensor_scales), block, loop, scale, M, N
    )
    gl.warp_specialize(
        [
            (produce, (resident, streamed, (stats,), pipeline, block, loop, CHUNKS)),
            (consume, (program, 0, CAUSAL, VARIES, BIAS_LAYOUT)),
            (consume, (program, 1, CAUSAL, VARIES, BIAS_LAYOUT)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
