"""The kernel of d_k and d_k_t of the resident keys, streaming over query tiles; MATH.md (1)-(6), (9)-(14), (16), (19).

In the same pass it computes d_v and d_v_t (17), (20), or accumulates d_q and d_q_t (dq_accum.py), or neither. Tiles are
[keys, queries].
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
from .dq_accum import accumulate, allocate, finish, store_zeros
from .packed_mask import load_mask_tile, packed_by_query, where_allowed
from .pipeline import (
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    accumulator,
    allocate_pipeline,
    keep_above,
    load_register_operands,
    optional,
    produce,
    resident_rows,
    row_statistic,
    softmax_scale_of,
    streamed_rows,
    sub_tile_rows,
)
from .results import store_results
from .scales import D_K


@gluon.jit
def _plain_tile(accs, inputs, scale, row0, tile, consumer: gl.constexpr, CAUSAL: gl.constexpr):
    """Adds what a tile gives to d_k / c and d_v, without tangents."""
    resident, streamed, stats, mask_tile, passed = inputs
    k, v = resident
    acc_k, acc_v = accs
    q, G = streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    s = add_scores(zero, k, q, USE_ACC=False)
    b = add_scores(zero, v, G, USE_ACC=False)
    lse = row_statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = where_causal(p, row0, tile, consumer, TILE)
    p = where_allowed(p, mask_tile, 0.0, TILE)
    keep_above(passed)
    acc_v = add_product(acc_v, left_operands(p.to(q[0].dtype), G), G)
    delta = row_statistic(stats, ROW_DELTA, TILE)
    b = warpgroup_mma_wait(CHUNKS, deps=[b])
    ds = (p * (b - delta)).to(q[0].dtype)  # mutate: ds
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    return complete(acc_k + acc_v)


@gluon.jit
def _tangent_tile(
    accs, inputs, dq, dq_tile, scale, row0, sub_tile, iteration, consumer: gl.constexpr, CAUSAL: gl.constexpr,
    WITH_DV: gl.constexpr, DQ_COLUMNS: gl.constexpr, SUB_TILE: gl.constexpr, SUB_TILES: gl.constexpr,
):  # fmt: skip
    """Adds what a sub-tile gives to d_k / c, d_v, d_k_t / c and d_v_t, and hands its dS and dS_t to `dq`.

    `sub_tile` counts within the head, SUB_TILE within the tile. `dq_tile` is the tile before among those of all heads.
    """
    resident, streamed, stats, mask_tile, passed = inputs
    k, v, k_t, v_t = resident
    if WITH_DV:
        acc_k, acc_v, acc_k_t, acc_v_t = accs
    else:
        acc_k, acc_k_t = accs
    q, G, q_t, T = streamed
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
    lse = row_statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(3 * CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = where_causal(p, row0, sub_tile, consumer, TILE)
    p = where_allowed(p, mask_tile, 0.0, TILE)
    keep_above(passed)
    if WITH_DV:
        weights = left_operands(p.to(q[0].dtype), q)
        acc_v_t = add_product(acc_v_t, weights, T)
        acc_v = add_product(acc_v, weights, G)
    row_a = row_statistic(stats, ROW_A, TILE)
    a = warpgroup_mma_wait((2 + OF_P) * CHUNKS, deps=[a])
    centred = a - row_a  # mutate: centred
    ds_t = (p * centred).to(q[0].dtype)
    weights_t = left_operands(ds_t, q)
    keep_above(passed)
    acc_k = add_product(acc_k, weights_t, q_t)  # mutate: acc_k
    acc_k_t = add_product(acc_k_t, weights_t, q)
    if CHUNKS == 1:  # else there are no registers for them while S_t is awaited
        mu = row_statistic(stats, MU, TILE)
        delta = row_statistic(stats, ROW_DELTA, TILE)
    s_t = warpgroup_mma_wait((2 + OF_P) * CHUNKS, deps=[s_t])
    if CHUNKS > 1:
        mu = row_statistic(stats, MU, TILE)
        delta = row_statistic(stats, ROW_DELTA, TILE)
    s_t = s_t * scale - mu
    if WITH_DV:
        acc_v = add_product(acc_v, left_operands((p * s_t).to(q[0].dtype), q), T)
    b = s_t * centred - delta
    b = add_scores(b, v, G)
    b = add_scores(b, v_t, T)  # mutate: b
    b = warpgroup_mma_wait(0, deps=[b])
    ds = (p * b).to(q[0].dtype)
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    if len(dq) > 0:
        accumulate(dq, ds, ds_t, dq_tile, iteration, consumer, DQ_COLUMNS, SUB_TILE, SUB_TILES)
    if WITH_DV:
        acc_k = acc_k + acc_v
        acc_k_t = acc_k_t + acc_v_t
    return complete(acc_k + acc_k_t)


@gluon.jit
def _consume(
    shared, scale, M, N, consumer: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WITH_DV: gl.constexpr, DQ_COLUMNS: gl.constexpr, REGISTER_OPERANDS: gl.constexpr, SUB_TILES: gl.constexpr,
    VARIES: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, dq, resident_tiles, pipeline, stats_pipeline, mask, tensor_scales, barriers, block, loop = shared
    resident_full, full, empty = barriers
    batch, row0 = block[0], block[2]
    streamed_head, streamed_heads, first, last, heads = loop
    SUB_ROWS: gl.constexpr = pipeline[0].shape[3] // SUB_TILES
    accs = zeros(resident_tiles[: len(outs)])
    mbarrier.wait(resident_full.index(0), 0)
    register_operands = load_register_operands(resident_tiles[: REGISTER_OPERANDS * CHUNKS], consumer, SUB_ROWS)
    iteration = 0
    dq_tile = (batch * heads + streamed_head) * last + first  # of the tile before: its dS are zeros
    if len(dq) > 0:
        store_zeros(dq, consumer)
    for member in range(streamed_heads):
        packed_mask = packed_by_query(mask, batch, streamed_head + member, heads, M, N, VARIES)
        for tile in range(first, last):
            stage = iteration % STAGES
            passed = (full.index(stage), (iteration // STAGES) & 1)
            mask_tiles = ()
            for i in gl.static_range(SUB_TILES):
                row = row0 + consumer * CONSUMER_ROWS
                mask_tiles = mask_tiles + (load_mask_tile(packed_mask, row, tile * SUB_TILES + i, SUB_ROWS),)
            mbarrier.wait(passed[0], passed[1])
            in_memory = resident_rows(resident_tiles[len(register_operands) :], consumer, iteration)
            resident = by_tensor(register_operands + in_memory, CHUNKS)
            for i in gl.static_range(SUB_TILES):
                sub_tile = tile * SUB_TILES + i
                streamed = by_tensor(sub_tile_rows(streamed_rows(pipeline, stage), i, SUB_TILES), CHUNKS)
                stats = stats_pipeline[0].index(stage).slice(i * SUB_ROWS, SUB_ROWS, 1)
                inputs = (resident, streamed, stats, mask_tiles[i], passed)
                acc = by_tensor(accs, CHUNKS)
                if len(resident) == 2:
                    accs = _plain_tile(acc, inputs, scale, row0, sub_tile, consumer, CAUSAL)
                else:
                    accs = _tangent_tile(
                        acc, inputs, dq, dq_tile, scale, row0, sub_tile, iteration, consumer, CAUSAL, WITH_DV,
                        DQ_COLUMNS, i, SUB_TILES,
                    )  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            if len(dq) > 0:
                dq_tile = (batch * heads + streamed_head + member) * last + tile  # mutate: dq_tile
            iteration += 1
    if len(dq) > 0:
        finish(dq, dq_tile, iteration, consumer, DQ_COLUMNS)
    grads = ()
    for i in gl.static_range(len(accs)):
        # mutate: grads
        grads = grads + (accs[i] if WITH_DV and i // CHUNKS % 2 == 1 else accs[i] * scale,)
    # mutate: store_results
    store_results(outs, grads, resident_tiles, block, tensor_scales, consumer, CHUNKS, D_K, 1 if WITH_DV else 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, d_q, d_q_t, mask, tensor_scales,
    scale, M, N, heads, group,
    JVP: gl.constexpr, WITH_DV: gl.constexpr, DQ_COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    REGISTER_OPERANDS: gl.constexpr, SUB_TILES: gl.constexpr, BUFFER_STAGES: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one. DQ_COLUMNS is 0, or d_q and d_q_t are accumulated: it is then
    their number of columns, and backward_postprocess.py knows their layout.
    """
    resident = chunks(k, k_rest) + chunks(v, v_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest)
    outs = chunks(d_k, d_k_rest)
    CHUNKS: gl.constexpr = len(outs)
    if WITH_DV:
        outs = outs + chunks(d_v, d_v_rest)
    if JVP:
        resident = resident + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        streamed = streamed + chunks(q_t, q_t_rest) + chunks(T, T_rest)
        outs = outs + chunks(d_k_t, d_k_t_rest)
        if WITH_DV:
            outs = outs + chunks(d_v_t, d_v_t_rest)
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL)
    tiles, barriers = allocate_pipeline(resident, streamed, (stats,), STAGES)
    dq = ()
    if DQ_COLUMNS > 0:
        k_tiles, k_t_tiles = tiles[0][:CHUNKS], tiles[0][2 * CHUNKS : 3 * CHUNKS]
        dq = allocate((d_q, d_q_t), k_tiles, k_t_tiles, ROWS, SUB_TILES, BUFFER_STAGES)
    fence_async_shared()
    copies = (resident, streamed, (stats,)) + tiles + (barriers, block, loop)
    shared = (outs, dq) + tiles + (optional(mask), optional(tensor_scales), barriers, block, loop)
    gl.warp_specialize(
        [
            (produce, copies + (CHUNKS, STAGES)),
            (_consume, (shared, scale, M, N, 0, CHUNKS, STAGES, CAUSAL, WITH_DV, DQ_COLUMNS, REGISTER_OPERANDS,
             SUB_TILES, VARIES)),
            (_consume, (shared, scale, M, N, 1, CHUNKS, STAGES, CAUSAL, WITH_DV, DQ_COLUMNS, REGISTER_OPERANDS,
             SUB_TILES, VARIES)),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
