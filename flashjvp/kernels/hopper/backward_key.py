"""The kernel of d_k and d_k_t of the resident keys, streaming over query tiles; MATH.md (1)-(6), (9)-(14), (16), (19).

In the same pass it computes d_v and d_v_t (17), (20), or accumulates d_q and d_q_t (dq_accum.py), or neither. Tiles are
[keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backward_key_pairs import pairs_tile
from .bias import bias_operand, probabilities_of_keys
from .blocks import CONSUMER_ROWS, key_block, where_causal, where_key_exists
from .chunks import add_product, add_scores, complete, left_operands
from .dq_accum import accumulate, add_dq, allocate, await_readers
from .mainloop import begin, stream_queries
from .operands import key_operands
from .packed_mask import where_allowed
from .pairs import allocate_narrow_pairs, load_pairs
from .pipeline import (
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    Program,
    accumulator,
    allocate_pipeline,
    allocate_tiles,
    keep_above,
    load_chunks,
    optional,
    produce,
    row_statistic,
    softmax_scale_of,
)
from .results import store_results
from .scales import D_K


@gluon.jit
def _plain_tile(accs, dq, inputs, program, at, consumer: gl.constexpr, CAUSAL: gl.constexpr, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_k / c and d_v, without tangents."""
    k, v = inputs.resident
    acc_k, acc_v = accs
    q, G = inputs.streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    b = add_scores(zero, v, G, USE_ACC=False)
    lse = row_statistic(inputs.stats, LSE, TILE)
    s = warpgroup_mma_wait(CHUNKS, deps=[s])
    p = probabilities_of_keys(s, lse, program.scale, inputs.bias, inputs.passed, TILE)
    if CAUSAL:
        p = where_causal(p, at.tile, program, consumer, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    keep_above(inputs.passed)
    acc_v = add_product(acc_v, left_operands(p.to(q[0].dtype), G), G)
    delta = row_statistic(inputs.stats, ROW_DELTA, TILE)
    b = warpgroup_mma_wait(CHUNKS, deps=[b])
    ds = (p * (b - delta)).to(q[0].dtype)  # mutate: ds
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    return complete(acc_k + acc_v)


@gluon.jit
def _tangent_tile(
    accs, dq, inputs, program, at, consumer: gl.constexpr, CAUSAL: gl.constexpr, DQ_COLUMNS: gl.constexpr
):
    """Adds what a sub-tile gives to d_k / c, d_v, d_k_t / c and d_v_t, and hands its dS and dS_t to `dq`."""
    k, v, k_t, v_t = inputs.resident
    WITH_DV: gl.constexpr = len(accs) == 4
    if WITH_DV:
        acc_k, acc_v, acc_k_t, acc_v_t = accs
    else:
        acc_k, acc_k_t = accs
    q, G, q_t, T = inputs.streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    # Products with P and dS_t that are in flight while S_t and B are waited for.
    OF_P: gl.constexpr = 2 if WITH_DV else 0
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    a = add_scores(zero, v, T, USE_ACC=False)
    s_t = add_scores(zero, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    lse = row_statistic(inputs.stats, LSE, TILE)
    s = warpgroup_mma_wait(3 * CHUNKS, deps=[s])
    p = probabilities_of_keys(s, lse, program.scale, inputs.bias, inputs.passed, TILE)
    if CAUSAL:
        p = where_causal(p, at.tile, program, consumer, TILE)
    if len(dq) > 0 and len(inputs.mask) == 0 and len(inputs.bias) == 0:
        p = where_key_exists(p, program, consumer, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    keep_above(inputs.passed)
    if WITH_DV:
        weights = left_operands(p.to(q[0].dtype), q)
        acc_v_t = add_product(acc_v_t, weights, T)
        acc_v = add_product(acc_v, weights, G)
    row_a = row_statistic(inputs.stats, ROW_A, TILE)
    a = warpgroup_mma_wait((2 + OF_P) * CHUNKS, deps=[a])
    centred = a - row_a  # mutate: centred
    ds_t = (p * centred).to(q[0].dtype)
    weights_t = left_operands(ds_t, q)
    keep_above(inputs.passed)
    acc_k = add_product(acc_k, weights_t, q_t)  # mutate: acc_k
    acc_k_t = add_product(acc_k_t, weights_t, q)
    if CHUNKS == 1:  # else there are no registers for them while S_t is awaited
        mu = row_statistic(inputs.stats, MU, TILE)
        delta = row_statistic(inputs.stats, ROW_DELTA, TILE)
    s_t = warpgroup_mma_wait((2 + OF_P) * CHUNKS, deps=[s_t])
    if CHUNKS > 1:
        mu = row_statistic(inputs.stats, MU, TILE)
        delta = row_statistic(inputs.stats, ROW_DELTA, TILE)
    s_t = s_t * program.scale - mu
    if WITH_DV:
        acc_v = add_product(acc_v, left_operands((p * s_t).to(q[0].dtype), q), T)
    b = s_t * centred - delta
    b = add_scores(b, v, G)
    b = add_scores(b, v_t, T)  # mutate: b
    b = warpgroup_mma_wait(0, deps=[b])
    ds = (p * b).to(q[0].dtype)
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    if len(dq) > 0:
        accumulate(dq, ds, ds_t, at, consumer, DQ_COLUMNS)
    if WITH_DV:
        acc_k = acc_k + acc_v
        acc_k_t = acc_k_t + acc_v_t
    return complete(acc_k + acc_k_t)


@gluon.jit
def consume(
    program, dq, consumer: gl.constexpr, CHUNKS: gl.constexpr, JVP: gl.constexpr, CAUSAL: gl.constexpr,
    REGISTER_OPERANDS: gl.constexpr, SUB_TILES: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
    DQ_COLUMNS: gl.constexpr, stream: gl.constexpr = stream_queries,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    SUB_ROWS: gl.constexpr = program.pipeline.stats[0].shape[2] // SUB_TILES
    PAIRS: gl.constexpr = len(program.pipeline.streamed) < len(program.pipeline.resident)
    TANGENT_TILE: gl.constexpr = pairs_tile if PAIRS else _tangent_tile
    ADD_TILE: gl.constexpr = TANGENT_TILE if JVP else _plain_tile
    like = program.pipeline.resident[: len(program.outs)]
    accs, register_operands = begin(program, consumer, like, REGISTER_OPERANDS, CHUNKS, SUB_ROWS)
    accs, before, iteration = stream(
        ADD_TILE, accs, dq, register_operands, program, consumer, CHUNKS, CAUSAL, VARIES, BIAS_LAYOUT, SUB_TILES,
        DQ_COLUMNS,
    )  # fmt: skip
    if len(dq) > 0:
        if iteration > 0:
            add_dq(dq, before, iteration, consumer, DQ_COLUMNS)
        await_readers(dq)
    WITH_DV: gl.constexpr = len(accs) == len(program.pipeline.resident)
    grads = ()
    for i in gl.static_range(len(accs)):
        # mutate: grads
        grads = grads + (accs[i] if WITH_DV and i // CHUNKS % 2 == 1 else accs[i] * program.scale,)
    store_results(program, grads, consumer, CHUNKS, D_K, 1 if WITH_DV else 2)  # mutate: store_results


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, d_q, d_q_t, mask, bias, log_l, tensor_scales,
    scale, M, N, heads, group,
    JVP: gl.constexpr, WITH_DV: gl.constexpr, DQ_COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    REGISTER_OPERANDS: gl.constexpr, SUB_TILES: gl.constexpr, BUFFER_STAGES: gl.constexpr, VARIES: gl.constexpr,
    BIAS_LAYOUT: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one. DQ_COLUMNS is 0, or d_q and d_q_t are accumulated: it is then
    their number of columns, and backward_postprocess.py knows their layout. With PAIRS queries come as pairs, at a head
    dim of 64 (backward_key_pairs.py).
    """
    resident, streamed, outs = key_operands(
        k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest,
        d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, JVP, WITH_DV, PAIRS,
    )  # fmt: skip
    CHUNKS: gl.constexpr = 1 if k_rest is None else 2
    ALLOCATE: gl.constexpr = allocate_narrow_pairs if PAIRS else allocate_tiles
    LOAD: gl.constexpr = load_pairs if PAIRS else load_chunks
    ROWS: gl.constexpr = q.block_shape[-2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL)
    pipeline = allocate_pipeline(resident, streamed, (stats,), STAGES, ALLOCATE)
    dq = ()
    if DQ_COLUMNS > 0:
        k_tiles, k_t_tiles = pipeline.resident[:CHUNKS], pipeline.resident[2 * CHUNKS : 3 * CHUNKS]
        dq = allocate((d_q, d_q_t), k_tiles, k_t_tiles, ROWS, SUB_TILES, BUFFER_STAGES)
    fence_async_shared()
    program = Program(
        outs, pipeline, optional(mask), bias_operand(bias, log_l), optional(tensor_scales), block, loop, scale, M, N
    )
    gl.warp_specialize(
        [
            (produce, (resident, streamed, (stats,), pipeline, block, loop, CHUNKS, LOAD)),
            (
                consume,
                (program, dq, 0, CHUNKS, JVP, CAUSAL, REGISTER_OPERANDS, SUB_TILES, VARIES, BIAS_LAYOUT, DQ_COLUMNS),
            ),
            (
                consume,
                (program, dq, 1, CHUNKS, JVP, CAUSAL, REGISTER_OPERANDS, SUB_TILES, VARIES, BIAS_LAYOUT, DQ_COLUMNS),
            ),
        ],
        [4, 4],
        [240, 240],
    )
