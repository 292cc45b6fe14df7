"""The kernel of d_q and d_q_t of the resident queries, streaming over key tiles; MATH.md (1)-(6), (9)-(15), (18).

Nothing is accumulated in global memory, so results are bit-reproducible. Tiles are [queries, keys].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import CONSUMER_ROWS, query_block, unmasked_tiles, where_visible
from .chunks import add_product, add_scores, by_tensor, chunks, complete, left_operands, scaled, zeros
from .packed_mask import load_mask_tile, packed_by_key, where_allowed
from .pipeline import (
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    STATISTICS,
    accumulator,
    allocate_pipeline,
    keep_above,
    load_register_operands,
    optional,
    produce,
    resident_rows,
    softmax_scale_of,
    streamed_rows,
)
from .results import store_results
from .scales import D_Q


@gluon.jit
def _load_statistic(stats, head, padded, rows, which: gl.constexpr):
    """One statistic of 64 queries as [64, 1], from [batch * heads, 4, padded rows]."""
    return gl.load(stats + (head * STATISTICS + which) * padded + rows)[:, None]


@gluon.jit
def _plain_tile(
    acc, resident, streamed, rows, mask_tile, passed, scale, row0, tile, N, CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """Adds what a tile gives to d_q / c, without tangents."""
    q, G = resident
    k, v = streamed
    lse, delta = rows[0], rows[3]
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    b = add_scores(zero, G, v, USE_ACC=False)
    s = warpgroup_mma_wait(CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if MASKED:
        p = where_visible(p, 0.0, row0, tile, N, TILE, CAUSAL)
    p = where_allowed(p, mask_tile, 0.0, TILE)
    keep_above(passed)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = left_operands((p * (b - delta)).to(k[0].dtype), k)
    return complete(add_product(acc[0], ds, k))


@gluon.jit
def _tangent_tile(
    acc, resident, streamed, rows, mask_tile, passed, scale, row0, tile, N, CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """Adds what a tile gives to d_q / c and d_q_t / c."""
    acc_q, acc_q_t = acc
    q, G, q_t, T = resident  # mutate: q, G, q_t, T
    k, v, k_t, v_t = streamed
    lse, mu, row_a, delta = rows
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    a = add_scores(zero, T, v, USE_ACC=False)
    s_t = add_scores(zero, q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)
    s = warpgroup_mma_wait(3 * CHUNKS, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if MASKED:
        p = where_visible(p, 0.0, row0, tile, N, TILE, CAUSAL)
    p = where_allowed(p, mask_tile, 0.0, TILE)
    keep_above(passed)
    a = warpgroup_mma_wait(2 * CHUNKS, deps=[a])
    centred = a - row_a
    ds_t = left_operands((p * centred).to(k[0].dtype), k)
    keep_above(passed)
    acc_q_t = add_product(acc_q_t, ds_t, k)
    acc_q = add_product(acc_q, ds_t, k_t)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    b = (s_t * scale - mu) * centred - delta  # mutate: b
    b = add_scores(b, G, v)
    b = add_scores(b, T, v_t)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = left_operands((p * b).to(k[0].dtype), k)
    acc_q = add_product(acc_q, ds, k)
    return complete(acc_q + acc_q_t)


@gluon.jit
def _mainloop(
    accs, shared, scale, row0, N, first, last, consumer: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Adds the tiles from `first` to `last`, MASKED by position or not."""
    register_operands, resident_tiles, pipeline, rows, full, empty, packed_mask = shared
    KEYS: gl.constexpr = pipeline[0].shape[3]
    row = row0 + consumer * CONSUMER_ROWS
    for tile in range(first, last):
        stage = tile % STAGES
        passed = (full.index(stage), (tile // STAGES) & 1)
        mask_tile = load_mask_tile(packed_mask, row, tile, KEYS)
        mbarrier.wait(passed[0], passed[1])
        resident = by_tensor(
            register_operands + resident_rows(resident_tiles[len(register_operands) :], consumer, tile), CHUNKS
        )
        streamed = by_tensor(streamed_rows(pipeline, stage), CHUNKS)
        acc = by_tensor(accs, CHUNKS)
        if len(resident) == 2:
            accs = _plain_tile(acc, resident, streamed, rows, mask_tile, passed, scale, row, tile, N, CAUSAL, MASKED)
        else:
            accs = _tangent_tile(acc, resident, streamed, rows, mask_tile, passed, scale, row, tile, N, CAUSAL, MASKED)
        mbarrier.arrive(empty.index(stage), count=1)
    return accs


@gluon.jit
def _consume(
    shared, scale, M, N, consumer: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    REGISTER_OPERANDS: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 queries."""
    outs, resident_tiles, pipeline, stats, packed_mask, tensor_scales, barriers, block, loop = shared
    resident_full, full, empty = barriers
    batch, resident_head, row0 = block
    last, heads = loop[3], loop[4]
    KEYS: gl.constexpr = pipeline[0].shape[3]
    TILE: gl.constexpr = accumulator(KEYS)
    numbers = row0 + consumer * CONSUMER_ROWS + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, TILE))
    head = batch.to(gl.int64) * heads + resident_head
    padded = gl.cdiv(M, 2 * CONSUMER_ROWS) * (2 * CONSUMER_ROWS)
    rows = (
        _load_statistic(stats, head, padded, numbers, LSE),
        _load_statistic(stats, head, padded, numbers, MU),
        _load_statistic(stats, head, padded, numbers, ROW_A),
        _load_statistic(stats, head, padded, numbers, ROW_DELTA),
    )
    accs = zeros(resident_tiles[: len(outs)])
    mbarrier.wait(resident_full.index(0), 0)
    register_operands = load_register_operands(resident_tiles[: REGISTER_OPERANDS * CHUNKS], consumer, KEYS)
    unmasked = unmasked_tiles(row0 + consumer * CONSUMER_ROWS, N, last, KEYS, CAUSAL)
    shared = (register_operands, resident_tiles, pipeline, rows, full, empty, packed_mask)
    accs = _mainloop(accs, shared, scale, row0, N, 0, unmasked, consumer, CHUNKS, STAGES, CAUSAL, False)
    accs = _mainloop(accs, shared, scale, row0, N, unmasked, last, consumer, CHUNKS, STAGES, CAUSAL, True)
    # mutate: store_results
    store_results(outs, scaled(accs, scale), resident_tiles, block, tensor_scales, consumer, CHUNKS, D_Q, 1)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_query_kernel(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, stats,
    d_q, d_q_rest, d_q_t, d_q_t_rest, mask, tensor_scales, scale, M, N, heads, group,
    JVP: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr,
    VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head against all keys.

    `stats` has values for the rows beyond the last query, too. A `_rest` is a tensor's second chunk, if it has one.
    """
    resident = chunks(q, q_rest) + chunks(G, G_rest)
    streamed = chunks(k, k_rest) + chunks(v, v_rest)
    outs = chunks(d_q, d_q_rest)
    CHUNKS: gl.constexpr = len(outs)
    if JVP:
        resident = resident + chunks(q_t, q_t_rest) + chunks(T, T_rest)
        streamed = streamed + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        outs = outs + chunks(d_q_t, d_q_t_rest)
    KEYS: gl.constexpr = k.block_shape[2]
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = query_block(M, N, heads, group, KEYS, CAUSAL)
    packed_mask = packed_by_key(mask, block[0], block[1], heads, M, N, VARIES)
    tiles, barriers = allocate_pipeline(resident, streamed, (), STAGES)
    fence_async_shared()
    copies = (resident, streamed, ()) + tiles + (barriers, block, loop)
    shared = (outs,) + tiles[:2] + (stats, packed_mask, optional(tensor_scales), barriers, block, loop)
    gl.warp_specialize(
        [
            (produce, copies + (CHUNKS, STAGES)),
            (_consume, (shared, scale, M, N, 0, CHUNKS, STAGES, CAUSAL, REGISTER_OPERANDS)),
            (_consume, (shared, scale, M, N, 1, CHUNKS, STAGES, CAUSAL, REGISTER_OPERANDS)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
