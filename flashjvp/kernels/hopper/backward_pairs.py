"""The kernel of d_k and d_k_t of the resident keys for a head dim of 128; it can accumulate d_q and d_q_t, too; MATH.md
(1)-(6), (9)-(16), (18), (19).

Tiles are [keys, queries]. A pair is two tensors in one tile, q above q_t and T above G: a product with a pair is two
products that read their left operand once. For d_q both consumers store dS and dS_t of their keys in shared memory. One
tile later, when both have, each multiplies its half of the columns of all keys with them, and adds the products to
float32 accumulators in global memory, in any order. This comes last in an iteration, when the registers of the scores
are free again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import CONSUMER_ROWS, key_block, where_causal
from .dq_accum import atomic_add_tile
from .packed_mask import load_mask_tile, packed_by_query, where_allowed
from .pipeline import (
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    STATISTICS,
    accumulator,
    allocate_tiles,
    keep_above,
    left_operand,
    load_resident,
    make_barriers,
    optional,
    resident_rows,
    row_statistic,
    softmax_scale_of,
    streamed_rows,
)
from .results import store_results
from .scales import D_K
from .triton_compat import addressed_here, here, load_tile

BUFFER_STAGES = gl.constexpr(2)  # how many tiles' dS and dS_t shared memory holds
PIECE = gl.constexpr(64)  # columns of one copy: the tile of a pair is copied in two


@gluon.jit
def _allocate_pairs(tensors, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of each pair of tensors."""
    tiles = ()
    for i in gl.static_range(len(tensors) // 2):
        x = tensors[2 * i]
        tiles = tiles + (gl.allocate_shared_memory(x.dtype, [COUNT, 1, 1, 2 * x.block_shape[2], 2 * PIECE], x.layout),)
    return tiles


@gluon.jit
def _split_rows(pair):
    """A pair's two tiles, [rows, D] each, addressed here."""
    ROWS: gl.constexpr = pair.shape[0] // 2
    pair = addressed_here(pair)
    return pair.slice(0, ROWS, 0), pair.slice(ROWS, ROWS, 0)  # mutate: return pair slice


@gluon.jit
def _split_product(product):
    """Splits a product with two stacked operands.

    Before accumulating into either half, add 0.0 to copy it into its own registers; otherwise ptxas serialises every
    WGMMA (C7511).
    """
    ROWS: gl.constexpr = product.shape[1] // 2
    x, y = gl.split(product.reshape([CONSUMER_ROWS, 2, ROWS]).permute((0, 2, 1)))  # mutate: x, y
    return gl.convert_layout(x, accumulator(ROWS)), gl.convert_layout(y, accumulator(ROWS))


@gluon.jit
def _produce(
    resident, streamed, stats, resident_tiles, pipeline, stats_pipeline, barriers, block, loop, STAGES: gl.constexpr
):
    """The producer: as `pipeline.produce`, but two tensors are copied into one tile."""
    resident_full, full, empty = barriers
    batch = block[0]
    streamed_head, streamed_heads, first, last, heads = loop
    ROWS: gl.constexpr = streamed[0].block_shape[2]
    BYTES: gl.constexpr = len(streamed) * 2 * streamed[0].block_type.nbytes + STATISTICS * ROWS * 4
    load_resident(resident, resident_tiles, resident_full, block, 1)
    iteration = 0
    for member in range(streamed_heads):
        head = streamed_head + member
        for tile in range(first, last):
            stage = iteration % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((iteration // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(len(streamed)):
                rows = pipeline[i // 2].index(stage).slice(i % 2 * ROWS, ROWS, 2)
                for piece in gl.static_range(2):
                    coordinates = [batch, head, tile * ROWS, piece * PIECE]
                    load_tile(streamed[i], coordinates, bar, rows.slice(piece * PIECE, PIECE, 3))
            load_tile(stats, [(batch * heads + head) * STATISTICS, tile * ROWS], bar, stats_pipeline.index(stage))
            iteration += 1


@gluon.jit
def _ds_product(keys, ds_tiles, iteration, consumer: gl.constexpr, FIRST: gl.constexpr, COLUMNS: gl.constexpr):
    """In flight: keys.T @ [dS, dS_t] for a consumer's 64 columns of keys and COLUMNS of [dS, dS_t] from FIRST on."""
    total = gl.zeros([CONSUMER_ROWS, COLUMNS], gl.float32, accumulator(COLUMNS))
    for source in gl.static_range(2):
        x = resident_rows((keys,), source + here(), iteration)[0].slice(consumer * PIECE, PIECE, 1)
        # mutate: ds
        ds = ds_tiles.index(iteration % BUFFER_STAGES * 2 + source + (iteration >> 30) + here())
        ds = ds.slice(FIRST, COLUMNS, 1)
        total = warpgroup_mma(x.permute((1, 0)), ds, total, use_acc=source > 0, is_async=True)
    return total


@gluon.jit
def _add_dq(dq, resident_tiles, dq_tile, iteration, consumer: gl.constexpr):
    """Adds the products of the tile before, transposed, to d_q / c (15) and d_q_t / c (18)."""
    dq_accum, ds_tiles, ready, free = dq
    ROWS: gl.constexpr = ds_tiles.shape[2] // 2
    mbarrier.wait(ready.index(iteration % BUFFER_STAGES), (iteration // BUFFER_STAGES) & 1)
    total = _ds_product(resident_tiles[0], ds_tiles, iteration, consumer, 0, 2 * ROWS)
    rest = _ds_product(resident_tiles[2], ds_tiles, iteration, consumer, ROWS, ROWS)
    total, total_t = _split_product(warpgroup_mma_wait(2, deps=[total]))
    offset = (dq_tile.to(gl.int64) * 2 + consumer) * (PIECE * ROWS)
    atomic_add_tile(dq_accum[1] + offset, total_t)
    rest = warpgroup_mma_wait(0, deps=[rest])
    mbarrier.arrive(free.index(iteration % BUFFER_STAGES), count=1)
    atomic_add_tile(dq_accum[0] + offset, total + rest)  # mutate: atomic_add_tile


@gluon.jit
def _store_ds(dq, ds_pair, iteration, consumer: gl.constexpr):
    """Stores [dS, dS_t] of this consumer's keys for both consumers. Number 0 is zeros; iteration i has number i + 1."""
    ds_tiles, ready, free = dq[1], dq[2], dq[3]
    mbarrier.wait(free.index(iteration % BUFFER_STAGES), (iteration // BUFFER_STAGES & 1) ^ 1)
    ds_tiles.index(iteration % BUFFER_STAGES * 2 + consumer + (iteration >> 30)).store(ds_pair)
    fence_async_shared()
    mbarrier.arrive(ready.index(iteration % BUFFER_STAGES), count=1)


@gluon.jit
def _tile(
    accs, inputs, dq, resident_tiles, dq_tile, scale, row0, tile, iteration, consumer: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Adds what a tile gives to d_k / c and d_k_t / c, and what the tile before gives to d_q / c and d_q_t / c."""
    resident, streamed, stats, mask_tile, passed = inputs
    k, v, k_t, v_t = resident
    acc_k, acc_k_t = accs
    q_and_q_t, T_and_G = streamed
    ROWS: gl.constexpr = q_and_q_t.shape[0] // 2
    TILE: gl.constexpr = accumulator(ROWS)
    WEIGHTS: gl.constexpr = left_operand(2 * CONSUMER_ROWS)
    zero = gl.zeros([CONSUMER_ROWS, 2 * ROWS], gl.float32, accumulator(2 * ROWS))
    s = warpgroup_mma(addressed_here(k), addressed_here(q_and_q_t).permute((1, 0)), zero, use_acc=False, is_async=True)
    a = warpgroup_mma(addressed_here(v), addressed_here(T_and_G).permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = row_statistic(stats, LSE, TILE)
    s, s_t = _split_product(warpgroup_mma_wait(1, deps=[s]))
    q, q_t = _split_rows(q_and_q_t)
    s_t = warpgroup_mma(addressed_here(k_t), q.permute((1, 0)), s_t + 0.0, is_async=True)
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = where_causal(p, row0, tile, consumer, TILE)
    p = where_allowed(p, mask_tile, 0.0, TILE)  # mutate: p
    keep_above(passed)
    row_a = row_statistic(stats, ROW_A, TILE)
    a, b = _split_product(warpgroup_mma_wait(1, deps=[a]))
    T = _split_rows(T_and_G)[0]
    b = warpgroup_mma(addressed_here(v_t), T.permute((1, 0)), b - row_statistic(stats, ROW_DELTA, TILE), is_async=True)
    centred = a - row_a
    ds_t = (p * centred).to(q.dtype)
    weights_t = gl.convert_layout(ds_t, WEIGHTS)
    keep_above(passed)
    q, q_t = _split_rows(q_and_q_t)
    acc_k_t = warpgroup_mma(weights_t, q, acc_k_t, is_async=True)
    acc_k = warpgroup_mma(weights_t, q_t, acc_k, is_async=True)
    mu = row_statistic(stats, MU, TILE)
    s_t = warpgroup_mma_wait(3, deps=[s_t])
    s_t = s_t * scale - mu
    b = warpgroup_mma_wait(2, deps=[b])
    ds = (p * (s_t * centred + b)).to(q.dtype)
    q, q_t = _split_rows(q_and_q_t)
    acc_k = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), q, acc_k, is_async=True)
    if len(dq) > 0:
        ds_pair = gl.join(ds, ds_t).permute((0, 2, 1)).reshape([CONSUMER_ROWS, 2 * ROWS])
        _store_ds(dq, gl.convert_layout(ds_pair, accumulator(2 * ROWS)), iteration + 1, consumer)
        _add_dq(dq, resident_tiles, dq_tile, iteration, consumer)
    return warpgroup_mma_wait(0, deps=[acc_k, acc_k_t])


@gluon.jit
def _consume(
    shared, dq, done, scale, M, N, consumer: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    VARIES: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    outs, resident_tiles, pipeline, stats_pipeline, mask, tensor_scales, barriers, block, loop = shared
    resident_full, full, empty = barriers
    batch, row0 = block[0], block[2]
    streamed_head, streamed_heads, first, last, heads = loop
    zero = gl.zeros([CONSUMER_ROWS, 2 * CONSUMER_ROWS], gl.float32, accumulator(2 * CONSUMER_ROWS))
    accs = (zero, zero)
    mbarrier.wait(resident_full.index(0), 0)
    iteration = 0
    dq_tile = (batch * heads + streamed_head) * last + first
    if len(dq) > 0:
        WIDTH: gl.constexpr = dq[1].shape[2]
        _store_ds(dq, gl.zeros([CONSUMER_ROWS, WIDTH], pipeline[0].dtype, accumulator(WIDTH)), iteration, consumer)
    for member in range(streamed_heads):
        packed_mask = packed_by_query(mask, batch, streamed_head + member, heads, M, N, VARIES)
        for tile in range(first, last):
            stage = iteration % STAGES
            passed = (full.index(stage), (iteration // STAGES) & 1)
            mask_tile = load_mask_tile(packed_mask, row0 + consumer * CONSUMER_ROWS, tile, stats_pipeline.shape[2])
            mbarrier.wait(passed[0], passed[1])
            resident = resident_rows(resident_tiles, consumer, iteration)
            inputs = (resident, streamed_rows(pipeline, stage), stats_pipeline.index(stage), mask_tile, passed)
            accs = _tile(accs, inputs, dq, resident_tiles, dq_tile, scale, row0, tile, iteration, consumer, CAUSAL)
            mbarrier.arrive(empty.index(stage), count=1)
            if len(dq) > 0:
                dq_tile = (batch * heads + streamed_head + member) * last + tile  # mutate: dq_tile
            iteration += 1
    if len(dq) > 0:
        if iteration > 0:
            _add_dq(dq, resident_tiles, dq_tile, iteration, consumer)
        # The other consumer may still read this one's keys.
        mbarrier.arrive(done.index(0), count=1)
        mbarrier.wait(done.index(0), 0)
    store_results(outs, (accs[0] * scale, accs[1] * scale), resident_tiles, block, tensor_scales, consumer, 1, D_K, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_pairs_kernel(
    k, v, k_t, v_t, q, q_t, T, G, stats, d_k, d_k_t, d_q, d_q_t, mask, tensor_scales, scale, M, N, heads, group,
    DQ_ACCUM: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    With DQ_ACCUM, d_q and d_q_t are accumulators, in a layout that backward_postprocess.py knows.
    """
    ROWS: gl.constexpr = q.block_shape[2]
    resident = (k, v, k_t, v_t)
    streamed = (q, q_t, T, G)
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL)
    resident_tiles = allocate_tiles(resident, 2)
    pipeline = _allocate_pairs(streamed, STAGES)
    stats_pipeline = allocate_tiles((stats,), STAGES)[0]
    barriers = (make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    done = make_barriers(1, 2)
    dq = ()
    if DQ_ACCUM:
        DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(2 * ROWS, 16)
        ds_tiles = gl.allocate_shared_memory(q.dtype, [2 * BUFFER_STAGES, CONSUMER_ROWS, 2 * ROWS], DS_LAYOUT)
        dq = ((d_q, d_q_t), ds_tiles, make_barriers(BUFFER_STAGES, 2), make_barriers(BUFFER_STAGES, 2))
    fence_async_shared()
    tiles = (resident_tiles, pipeline, stats_pipeline)
    copies = (resident, streamed, stats) + tiles + (barriers, block, loop)
    shared = ((d_k, d_k_t),) + tiles + (optional(mask), optional(tensor_scales), barriers, block, loop)
    gl.warp_specialize(
        [
            (_produce, copies + (STAGES,)),
            (_consume, (shared, dq, done, scale, M, N, 0, STAGES, CAUSAL, VARIES)),
            (_consume, (shared, dq, done, scale, M, N, 1, STAGES, CAUSAL, VARIES)),
        ],
        [4, 4],
        [240, 240],
    )
