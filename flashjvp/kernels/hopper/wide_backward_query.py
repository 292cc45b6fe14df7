"""The kernel of d_q and d_q_t at head dims above 128, of 64 resident queries, streaming over key tiles; MATH.md
(1)-(6), (9)-(15), (18).

As in backward_query.py, but for the layout (wide_pipeline.py) and the order: A and B come first, from v and v_t, so that
the next tile's can land while S, S_t and the gradients are computed from k and k_t. Tiles are [queries, keys].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backward_query import load_statistic
from .blocks import CONSUMER_ROWS, query_block, where_visible
from .chunks import add_product, add_scores, chunks, complete, scaled
from .pipeline import LSE, MU, ROW_A, ROW_DELTA, Program, accumulator, keep_above
from .results import store_results
from .scales import D_Q
from .wide_pipeline import (
    WARPS,
    allocate_wide_pipeline,
    await_second,
    begin_wide,
    produce_wide,
    release_first,
    shared_operands,
    stream_keys_wide,
)


@gluon.jit
def _tile(accs, rows, inputs, program, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds what a tile gives to d_q / c and d_q_t / c."""
    acc_q, acc_q_t = accs
    q, G, q_t, T = inputs.resident
    v, v_t = inputs.first
    k, k_t = inputs.second
    lse, mu, row_a, delta = rows
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS, WARPS)
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    a = add_scores(zero, T, v, USE_ACC=False)
    b = add_scores(zero, G, v, USE_ACC=False)
    b = add_scores(b, T, v_t)
    await_second(inputs)
    s = add_scores(zero, q, k, USE_ACC=False)
    s_t = add_scores(zero, q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)
    a, b = warpgroup_mma_wait(3 * CHUNKS, deps=[a, b])
    release_first(inputs)
    centred = a - row_a
    b = b - delta
    keep_above(inputs.second_full)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = gl.exp2(s * (program.scale * 1.4426950408889634) - lse)
    if MASKED:
        p = where_visible(p, 0.0, program.block.row0, tile, program.N, TILE, CAUSAL)
    weights_t = shared_operands((p * centred).to(k[0].dtype), inputs.weights, 0, k)
    keep_above(inputs.second_full)
    acc_q_t = add_product(acc_q_t, weights_t, k)
    acc_q = add_product(acc_q, weights_t, k_t)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    weights = shared_operands((p * ((s_t * program.scale - mu) * centred + b)).to(k[0].dtype), inputs.weights, 1, k)
    acc_q = add_product(acc_q, weights, k)
    return complete(acc_q + acc_q_t), rows


@gluon.jit
def _consume(program, stats, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr):
    """The consumer: the gradients of 64 queries."""
    block = program.block
    KEYS: gl.constexpr = program.pipeline.first.tiles[0].shape[3]
    numbers = block.row0 + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, accumulator(KEYS, WARPS)))
    head = block.batch.to(gl.int64) * program.loop.query_heads + block.head
    padded = gl.cdiv(program.M, 2 * CONSUMER_ROWS) * (2 * CONSUMER_ROWS)
    rows = (
        load_statistic(stats, head, padded, numbers, LSE),
        load_statistic(stats, head, padded, numbers, MU),
        load_statistic(stats, head, padded, numbers, ROW_A),
        load_statistic(stats, head, padded, numbers, ROW_DELTA),
    )
    accs, _rows = stream_keys_wide(_tile, begin_wide(program), rows, program, CHUNKS, CAUSAL)
    store_results(program, scaled(accs, program.scale), 0, CHUNKS, D_Q, 1)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_backward_query_kernel(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, stats,
    d_q, d_q_rest, d_q_t, d_q_t_rest, scale, M, N, heads, group, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 64 queries of one head against all keys.

    `stats` has values for the rows beyond the last query, too. A `_rest` is a tensor's second chunk, if it has one.
    """
    resident = chunks(q, q_rest) + chunks(G, G_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest)
    first = chunks(v, v_rest) + chunks(v_t, v_t_rest)
    second = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    outs = chunks(d_q, d_q_rest) + chunks(d_q_t, d_q_t_rest)
    CHUNKS: gl.constexpr = len(outs) // 2
    KEYS: gl.constexpr = k.block_shape[2]
    gdc_launch_dependents()
    block, loop = query_block(M, N, heads, group, KEYS, CAUSAL, 1)
    pipeline = allocate_wide_pipeline(resident, first, second, (), STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, (), (), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce_wide, (resident, first, second, (), pipeline, block, loop, CHUNKS)),
            (_consume, (program, stats, CHUNKS, CAUSAL)),
        ],
        [8],
        [240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
