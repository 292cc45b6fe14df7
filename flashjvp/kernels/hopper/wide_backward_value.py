"""The kernel of d_v and d_v_t at head dims above 128, of 64 resident keys, streaming over query tiles; MATH.md (1)-(6),
(17), (20).

One consumer computes S and P, the other one S_t and P_t (wide_pipeline.py). q and q_t are the first tiles, G and T the
second. Tiles are [keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bias import bias_operand, probabilities_of_keys
from .blocks import CONSUMER_ROWS, key_block, where_causal
from .chunks import add_product, add_scores, chunks, complete, left_operands
from .packed_mask import where_allowed
from .pipeline import LSE, MU, Program, accumulator, keep_above, optional, row_statistic
from .wide_exchange import (
    WEIGHTS_T,
    P,
    allocate_exchange,
    await_given,
    chunk_of,
    give,
    load_numbers,
    load_weights,
    store_numbers,
    store_weights,
)
from .wide_pipeline import (
    allocate_wide_pipeline,
    await_first,
    await_second,
    begin_wide,
    produce_wide,
    release_first,
    store_chunk,
    stream_queries_wide,
)


@gluon.jit
def _tile_of_s(accs, inputs, program, tile, CAUSAL: gl.constexpr):
    """Adds what a tile gives to the first chunk of d_v and d_v_t."""
    k, q = inputs.resident[0], inputs.first[0]
    G, T = chunk_of(inputs.second, 0)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    await_first(inputs)
    s = add_scores(gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE), k, q, USE_ACC=False)
    await_second(inputs)
    lse = row_statistic(inputs.stats, LSE, TILE)
    s = warpgroup_mma_wait(0, deps=[s])
    release_first(inputs)
    p = probabilities_of_keys(s, lse, program.scale, inputs.bias, inputs.second_full, TILE)
    if CAUSAL:
        p = where_causal(p, tile, program, 0, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)  # mutate: p
    store_numbers(inputs, p)
    give(inputs, P)
    weights = left_operands(p.to(q[0].dtype), G)
    acc_v_t = add_product((accs[1],), weights, T)
    acc_v = add_product((accs[0],), weights, G)
    await_given(inputs, WEIGHTS_T)
    acc_v = add_product(acc_v, load_weights(inputs, 0, T), T)
    return complete(acc_v + acc_v_t)


@gluon.jit
def _tile_of_s_t(accs, inputs, program, tile, CAUSAL: gl.constexpr):
    """Adds what a tile gives to the second chunk of d_v and d_v_t."""
    k, k_t = inputs.resident
    q, q_t = inputs.first
    G, T = chunk_of(inputs.second, 1)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    await_first(inputs)
    s_t = add_scores(gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE), k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    await_second(inputs)
    mu = row_statistic(inputs.stats, MU, TILE)
    await_given(inputs, P)
    p = load_numbers(inputs)
    weights = left_operands(p.to(q[0].dtype), G)
    keep_above(inputs.second_full)
    acc_v_t = add_product((accs[1],), weights, T)
    acc_v = add_product((accs[0],), weights, G)
    s_t = warpgroup_mma_wait(2, deps=[s_t])
    release_first(inputs)
    weights_t = (p * (s_t * program.scale - mu)).to(q[0].dtype)  # mutate: weights_t
    store_weights(inputs, 0, weights_t)
    give(inputs, WEIGHTS_T)
    acc_v = add_product(acc_v, left_operands(weights_t, T), T)
    return complete(acc_v + acc_v_t)


@gluon.jit
def _consume(program, CHUNK: gl.constexpr, CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr):
    """A consumer: one chunk of the gradients of 64 keys."""
    outs = (program.outs[CHUNK], program.outs[2 + CHUNK])
    TILE: gl.constexpr = _tile_of_s if CHUNK == 0 else _tile_of_s_t
    accs = stream_queries_wide(TILE, begin_wide(program, outs), program, CAUSAL, VARIES, BIAS_LAYOUT)
    store_chunk(program, outs, accs, CHUNK)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_backward_value_kernel(
    k, k_rest, k_t, k_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats, d_v, d_v_rest, d_v_t, d_v_t_rest,
    mask, bias, log_l, scale, M, N, heads, group,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head against all queries of its heads. A `_rest` is a tensor's second chunk."""
    resident = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    first = chunks(q, q_rest) + chunks(q_t, q_t_rest)
    second = chunks(G, G_rest) + chunks(T, T_rest)
    outs = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_launch_dependents()
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL, 1)
    pipeline = allocate_wide_pipeline(resident, first, second, (stats,), allocate_exchange(q, 1), STAGES, 2)
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
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
