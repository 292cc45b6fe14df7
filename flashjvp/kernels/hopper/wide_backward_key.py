"""The kernel of d_k and d_k_t at head dims above 128, of 64 resident keys, streaming over query tiles; MATH.md (1)-(6),
(9)-(14), (16), (19).

Tiles are [keys, queries]. G and T are the first tiles, q and q_t the second. Who computes what: wide_gradients.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bias import bias_operand, probabilities_of_keys
from .blocks import CONSUMER_ROWS, key_block, where_causal
from .chunks import add_scores, chunks, scaled
from .packed_mask import where_allowed
from .pipeline import LSE, MU, ROW_A, ROW_DELTA, Program, accumulator, optional, row_statistic
from .wide_exchange import allocate_exchange
from .wide_gradients import add_gradients_from_cotangents, add_gradients_from_scores, scores
from .wide_pipeline import (
    allocate_wide_pipeline,
    await_first,
    await_second,
    begin_wide,
    produce_wide,
    store_chunk,
    stream_queries_wide,
)


@gluon.jit
def _tile_of_scores(accs, inputs, program, tile, CAUSAL: gl.constexpr):
    """Adds what a tile gives to the first chunk of d_k / c and d_k_t / c."""
    CHUNKS: gl.constexpr = len(inputs.second[0])
    TILE: gl.constexpr = accumulator(inputs.second[0][0].shape[0])
    s, s_t = scores(inputs)
    lse = row_statistic(inputs.stats, LSE, TILE)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = probabilities_of_keys(s, lse, program.scale, inputs.bias, inputs.second_full, TILE)
    if CAUSAL:
        p = where_causal(p, tile, program, 0, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)  # mutate: p
    mu = row_statistic(inputs.stats, MU, TILE)
    return add_gradients_from_scores(accs, p, s_t, program.scale, mu, inputs, 0)


@gluon.jit
def _tile_of_cotangents(accs, inputs, program, tile, CAUSAL: gl.constexpr):
    """Adds what a tile gives to the second chunk of d_k / c and d_k_t / c."""
    v, v_t = inputs.resident[1], inputs.resident[3]
    G, T = inputs.first
    ROWS: gl.constexpr = G[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    await_first(inputs)
    a = add_scores(zero, v, T, USE_ACC=False)
    b = add_scores(zero, v, G, USE_ACC=False)
    b = add_scores(b, v_t, T)  # mutate: b
    await_second(inputs)
    row_a = row_statistic(inputs.stats, ROW_A, TILE)
    delta = row_statistic(inputs.stats, ROW_DELTA, TILE)
    return add_gradients_from_cotangents(accs, a, b, row_a, delta, inputs, 1)


@gluon.jit
def _consume(program, CHUNK: gl.constexpr, CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr):
    """A consumer: one chunk of the gradients of 64 keys."""
    outs = (program.outs[CHUNK], program.outs[2 + CHUNK])
    TILE: gl.constexpr = _tile_of_scores if CHUNK == 0 else _tile_of_cotangents
    accs = stream_queries_wide(TILE, begin_wide(program, outs), program, CAUSAL, VARIES, BIAS_LAYOUT)
    store_chunk(program, outs, scaled(accs, program.scale), CHUNK)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_backward_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_k_t, d_k_t_rest, mask, bias, log_l, scale, M, N, heads, group,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head against all queries of its heads. A `_rest` is a tensor's second chunk."""
    resident = chunks(k, k_rest) + chunks(v, v_rest) + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
    first = chunks(G, G_rest) + chunks(T, T_rest)
    second = chunks(q, q_rest) + chunks(q_t, q_t_rest)
    outs = chunks(d_k, d_k_rest) + chunks(d_k_t, d_k_t_rest)
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL, 1)
    pipeline = allocate_wide_pipeline(resident, first, second, (stats,), allocate_exchange(q, 2), STAGES, 1)
    fence_async_shared()
    program = Program(outs, pipeline, optional(mask), bias_operand(bias, log_l), (), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce_wide, (resident, first, second, (stats,), pipeline, block, loop)),
            (_consume, (program, 0, CAUSAL, VARIES, BIAS_LAYOUT)),
            (_consume, (program, 1, CAUSAL, VARIES, BIAS_LAYOUT)),
        ],
        [4, 4],
        [240, 240],
    )
