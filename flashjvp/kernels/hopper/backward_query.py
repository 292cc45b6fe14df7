"""The kernel of d_q and d_q_t of the resident queries, streaming over key tiles; MATH.md (1)-(6), (9)-(15), (18).

Nothing is accumulated in global memory, so results are bit-reproducible. Tiles are [queries, keys].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backward_query_pairs import pairs_tile
from .bias import bias_of_head, bias_operand, probabilities_of_queries
from .blocks import CONSUMER_ROWS, query_block, where_visible
from .chunks import add_product, add_scores, complete, left_operands, scaled
from .mainloop import begin, stream_keys
from .operands import query_operands
from .packed_mask import packed_by_key, where_allowed
from .pairs import allocate_pairs, are_pairs, load_pairs
from .pipeline import (
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    STATISTICS,
    Program,
    accumulator,
    allocate_pipeline,
    allocate_tiles,
    keep_above,
    load_chunks,
    optional,
    produce,
    rows_of_a_tile,
    softmax_scale_of,
)
from .results import store_results
from .scales import D_Q


@gluon.jit
def _load_statistic(stats, head, padded, rows, which: gl.constexpr):
    """One statistic of 64 queries as [64, 1], from [batch * heads, 4, padded rows]."""
    return gl.load(stats + (head * STATISTICS + which) * padded + rows)[:, None]


@gluon.jit
def _plain_tile(accs, rows, inputs, program, row, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds what a tile gives to d_q / c, without tangents."""
    q, G = inputs.resident
    k, v = inputs.streamed
    delta = rows[ROW_DELTA]
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    b = add_scores(zero, G, v, USE_ACC=False)
    s = warpgroup_mma_wait(CHUNKS, deps=[s])
    p = probabilities_of_queries(s, rows[LSE], rows[ROW_DELTA + 1 :], program.scale, inputs.bias, TILE)
    if MASKED:
        p = where_visible(p, 0.0, row, tile, program.N, TILE, CAUSAL)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    keep_above(inputs.passed)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = left_operands((p * (b - delta)).to(k[0].dtype), k)
    return complete(add_product(accs[0], ds, k)), rows


@gluon.jit
def _tangent_tile(accs, rows, inputs, program, row, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds what a tile gives to d_q / c and d_q_t / c."""
    acc_q, acc_q_t = accs
    q, G, q_t, T = inputs.resident  # mutate: q, G, q_t, T
    k, v, k_t, v_t = inputs.streamed
    mu, row_a, delta = rows[MU], rows[ROW_A], rows[ROW_DELTA]
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    a = add_scores(zero, T, v, USE_ACC=False)
    s_t = add_scores(zero, q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)
    s = warpgroup_mma_wait(3 * CHUNKS, deps=[s])
    p = probabilities_of_queries(s, rows[LSE], rows[ROW_DELTA + 1 :], program.scale, inputs.bias, TILE)
    if MASKED:
        p = where_visible(p, 0.0, row, tile, program.N, TILE, CAUSAL)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    keep_above(inputs.passed)
    a = warpgroup_mma_wait(2 * CHUNKS, deps=[a])
    centred = a - row_a
    ds_t = left_operands((p * centred).to(k[0].dtype), k)
    keep_above(inputs.passed)
    acc_q_t = add_product(acc_q_t, ds_t, k)
    acc_q = add_product(acc_q, ds_t, k_t)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    b = (s_t * program.scale - mu) * centred - delta  # mutate: b
    b = add_scores(b, G, v)
    b = add_scores(b, T, v_t)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = left_operands((p * b).to(k[0].dtype), k)
    acc_q = add_product(acc_q, ds, k)
    return complete(acc_q + acc_q_t), rows


@gluon.jit
def consume(
    program, stats, consumer: gl.constexpr, JVP: gl.constexpr, CAUSAL: gl.constexpr, REGISTER_OPERANDS: gl.constexpr,
    BIAS_LAYOUT: gl.constexpr, stream: gl.constexpr = stream_keys,
):  # fmt: skip
    """A consumer: the gradients of 64 queries."""
    block = program.block
    CHUNKS: gl.constexpr = len(program.outs) // 2 if JVP else len(program.outs)
    KEYS: gl.constexpr = rows_of_a_tile(program.pipeline.resident, program.pipeline.streamed)
    TILE: gl.constexpr = accumulator(KEYS)
    PAIRS: gl.constexpr = len(program.pipeline.streamed) < len(program.pipeline.resident)
    TANGENT_TILE: gl.constexpr = pairs_tile if PAIRS else _tangent_tile
    ADD_TILE: gl.constexpr = TANGENT_TILE if JVP else _plain_tile
    numbers = block.row0 + consumer * CONSUMER_ROWS + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, TILE))
    head = block.batch.to(gl.int64) * program.loop.query_heads + block.head
    padded = gl.cdiv(program.M, 2 * CONSUMER_ROWS) * (2 * CONSUMER_ROWS)
    rows = (
        _load_statistic(stats, head, padded, numbers, LSE),
        _load_statistic(stats, head, padded, numbers, MU),
        _load_statistic(stats, head, padded, numbers, ROW_A),
        _load_statistic(stats, head, padded, numbers, ROW_DELTA),
    )
    if len(program.bias) > 0:
        rows = rows + (gl.load(program.bias[2] + head * padded + numbers)[:, None],)
    like = program.pipeline.resident[: len(program.outs)]
    accs, register_operands = begin(program, consumer, like, REGISTER_OPERANDS, CHUNKS, KEYS)
    accs, _rows = stream(ADD_TILE, accs, rows, register_operands, program, consumer, CHUNKS, CAUSAL, BIAS_LAYOUT)
    store_results(program, scaled(accs, program.scale), consumer, CHUNKS, D_Q, 1)  # mutate: store_results


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_query_kernel(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, stats,
    d_q, d_q_rest, d_q_t, d_q_t_rest, mask, bias, log_l, tensor_scales, scale, M, N, heads, group,
    JVP: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr,
    VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head against all keys.

    `stats` has values for the rows beyond the last query, too. A `_rest` is a tensor's second chunk, if it has one.
    Keys may come as pairs (backward_query_pairs.py).
    """
    resident, streamed, outs = query_operands(
        q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest,
        d_q, d_q_rest, d_q_t, d_q_t_rest, JVP,
    )  # fmt: skip
    CHUNKS: gl.constexpr = 1 if q_rest is None else 2
    KEYS: gl.constexpr = k.block_shape[-2]
    PAIRS: gl.constexpr = are_pairs(resident, streamed)
    ALLOCATE: gl.constexpr = allocate_pairs if PAIRS else allocate_tiles
    LOAD: gl.constexpr = load_pairs if PAIRS else load_chunks
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = query_block(M, N, heads, group, KEYS, CAUSAL)
    packed_mask = packed_by_key(mask, block.batch, block.head, heads, M, N, VARIES)
    bias = bias_of_head(bias_operand(bias, log_l), block.batch, block.head)
    pipeline = allocate_pipeline(resident, streamed, (), STAGES, ALLOCATE)
    fence_async_shared()
    program = Program(outs, pipeline, packed_mask, bias, optional(tensor_scales), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce, (resident, streamed, (), pipeline, block, loop, CHUNKS, LOAD)),
            (consume, (program, stats, 0, JVP, CAUSAL, REGISTER_OPERANDS, BIAS_LAYOUT)),
            (consume, (program, stats, 1, JVP, CAUSAL, REGISTER_OPERANDS, BIAS_LAYOUT)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
