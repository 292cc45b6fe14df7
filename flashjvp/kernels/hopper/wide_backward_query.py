"""The kernel of d_q and d_q_t at head dims above 128, of 64 resident queries, streaming over key tiles; MATH.md
(1)-(6), (9)-(15), (18).

Tiles are [queries, keys]. v and v_t are the first tiles, k and k_t the second. Who computes what: wide_gradients.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bias import bias_of_head, bias_operand, probabilities_of_queries
from .blocks import CONSUMER_ROWS, query_block, where_visible
from .chunks import add_scores, chunks, scaled
from .packed_mask import packed_by_key, where_allowed
from .pipeline import LSE, MU, ROW_A, ROW_DELTA, STATISTICS, Program, accumulator
from .wide_exchange import allocate_exchange
from .wide_gradients import add_gradients_from_cotangents, add_gradients_from_scores, scores
from .wide_pipeline import (
    allocate_wide_pipeline,
    await_first,
    await_second,
    begin_wide,
    produce_wide,
    store_chunk,
    stream_keys_wide,
)


@gluon.jit
def _tile_of_scores(accs, rows, inputs, program, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds what a tile gives to the first chunk of d_q / c and d_q_t / c."""
    CHUNKS: gl.constexpr = len(inputs.second[0])
    TILE: gl.constexpr = accumulator(inputs.second[0][0].shape[0])
    lse, mu = rows[0], rows[1]
    s, s_t = scores(inputs)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = probabilities_of_queries(s, lse, rows[2:], program.scale, inputs.bias, TILE)
    if MASKED:
        p = where_visible(p, 0.0, program.block.row0, tile, program.N, TILE, CAUSAL)
    p = where_allowed(p, inputs.mask, 0.0, TILE)  # mutate: p
    return add_gradients_from_scores(accs, p, s_t, program.scale, mu, inputs, 0), rows


@gluon.jit
def _tile_of_cotangents(accs, rows, inputs, program, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds what a tile gives to the second chunk of d_q / c and d_q_t / c."""
    G, T = inputs.resident[1], inputs.resident[3]
    v, v_t = inputs.first
    row_a, delta = rows
    KEYS: gl.constexpr = v[0].shape[0]
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, accumulator(KEYS))
    await_first(inputs)
    a = add_scores(zero, T, v, USE_ACC=False)
    b = add_scores(zero, G, v, USE_ACC=False)
    b = add_scores(b, T, v_t)  # mutate: b
    await_second(inputs)
    return add_gradients_from_cotangents(accs, a, b, row_a, delta, inputs, 1), rows


@gluon.jit
def _consume(program, stats, CHUNK: gl.constexpr, CAUSAL: gl.constexpr, BIAS_LAYOUT: gl.constexpr):
    """A consumer: one chunk of the gradients of 64 queries."""
    block = program.block
    KEYS: gl.constexpr = program.pipeline.first.tiles[0].shape[3]
    numbers = block.row0 + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, accumulator(KEYS)))
    head = block.batch.to(gl.int64) * program.loop.query_heads + block.head
    padded = gl.cdiv(program.M, 2 * CONSUMER_ROWS) * (2 * CONSUMER_ROWS)
    FIRST: gl.constexpr = LSE if CHUNK == 0 else ROW_A
    OTHER: gl.constexpr = MU if CHUNK == 0 else ROW_DELTA
    rows = (
        gl.load(stats + (head * STATISTICS + FIRST) * padded + numbers)[:, None],
        gl.load(stats + (head * STATISTICS + OTHER) * padded + numbers)[:, None],
    )
    if CHUNK == 0 and len(program.bias) > 0:
        # mutate: rows
        rows = rows + (gl.load(program.bias[2] + head * padded + numbers)[:, None],)
    outs = (program.outs[CHUNK], program.outs[2 + CHUNK])
    TILE: gl.constexpr = _tile_of_scores if CHUNK == 0 else _tile_of_cotangents
    accs, _rows = stream_keys_wide(TILE, begin_wide(program, outs), rows, program, CAUSAL, BIAS_LAYOUT)
    store_chunk(program, outs, scaled(accs, program.scale), CHUNK)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_backward_query_kernel(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, stats,
    d_q, d_q_rest, d_q_t, d_q_t_rest, mask, bias, log_l, scale, M, N, heads, group,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 64 queries of one head against all keys.

    `stats` has values for the rows beyond the last query, too. A `_rest` is a tensor's second chunk.
    """
    resident = chunks(q, q_rest) + chunks(G, G_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest)
    first = chunks(v, v_rest) + chunks(v_t, v_t_rest)
    second = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    outs = chunks(d_q, d_q_rest) + chunks(d_q_t, d_q_t_rest)
    KEYS: gl.constexpr = k.block_shape[2]
    gdc_launch_dependents()
    block, loop = query_block(M, N, heads, group, KEYS, CAUSAL, 1)
    packed_mask = packed_by_key(mask, block.batch, block.head, heads, M, N, VARIES)
    bias = bias_of_head(bias_operand(bias, log_l), block.batch, block.head)
    pipeline = allocate_wide_pipeline(resident, first, second, (), allocate_exchange(k, 2), STAGES, 1)
    fence_async_shared()
    program = Program(outs, pipeline, packed_mask, bias, (), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce_wide, (resident, first, second, (), pipeline, block, loop)),
            (_consume, (program, stats, 0, CAUSAL, BIAS_LAYOUT)),
            (_consume, (program, stats, 1, CAUSAL, BIAS_LAYOUT)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
