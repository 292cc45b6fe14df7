"""The kernel of d_k and d_k_t of the resident keys for a head dim of 128; it can accumulate d_q and d_q_t, too; MATH.md
(1)-(6), (9)-(16), (18), (19).

Tiles are [keys, queries], in pairs (pairs.py): q above q_t and T above G. For d_q both consumers store dS and dS_t of
their keys in shared memory. One tile later, when both have, each multiplies its half of the columns of all keys with
them, and adds the products to float32 accumulators in global memory, in any order. This comes last in an iteration,
when the registers of the scores are free again.
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

from .bias import bias_operand, probabilities_of_keys
from .blocks import CONSUMER_ROWS, key_block, where_causal, where_key_exists
from .chunks import flat, scaled
from .dq_accum import Dq, atomic_add_tile, await_readers, store_ds
from .mainloop import begin, stream_queries
from .packed_mask import where_allowed
from .pairs import PIECE, allocate_pairs, load_pairs, split_product, split_rows
from .pipeline import (
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    Program,
    accumulator,
    allocate_pipeline,
    barrier_of,
    keep_above,
    left_operand,
    make_barriers,
    optional,
    produce,
    resident_rows,
    row_statistic,
    softmax_scale_of,
)
from .results import store_results
from .scales import D_K
from .triton_compat import addressed_here, here

BUFFER_STAGES = gl.constexpr(2)  # how many tiles' dS and dS_t shared memory holds


@gluon.jit
def allocate_dq(accums, pipeline, done):
    """`Dq` for the tiles of this pipeline."""
    k, _v, k_t, _v_t = pipeline.resident
    ROWS: gl.constexpr = pipeline.stats[0].shape[2]
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(2 * ROWS, 16)
    ds_tiles = gl.allocate_shared_memory(k.dtype, [2 * BUFFER_STAGES, CONSUMER_ROWS, 2 * ROWS], DS_LAYOUT)
    ready, free = make_barriers(BUFFER_STAGES, 2), make_barriers(BUFFER_STAGES, 2)
    return Dq(accums, ds_tiles, ready, free, done, k, k_t)


@gluon.jit
def _ds_product(keys, dq, number, consumer: gl.constexpr, FIRST: gl.constexpr, COLUMNS: gl.constexpr):
    """In flight: keys.T @ [dS, dS_t] for a consumer's 64 columns of keys and COLUMNS of [dS, dS_t] from FIRST on."""
    total = gl.zeros([CONSUMER_ROWS, COLUMNS], gl.float32, accumulator(COLUMNS))
    for source in gl.static_range(2):
        x = resident_rows((keys,), source + here(), number)[0].slice(consumer * PIECE, PIECE, 1)
        ds = dq.ds_tiles.index(number % BUFFER_STAGES * 2 + source + (number >> 30) + here())  # mutate: ds
        ds = ds.slice(FIRST, COLUMNS, 1)
        total = warpgroup_mma(x.permute((1, 0)), ds, total, use_acc=source > 0, is_async=True)
    return total


@gluon.jit
def _add_dq(dq, dq_tile, number, consumer: gl.constexpr):
    """Adds the products of the tile before, transposed, to d_q / c (15) and d_q_t / c (18)."""
    ROWS: gl.constexpr = dq.ds_tiles.shape[2] // 2
    ready, phase = barrier_of(dq.ready, number)
    mbarrier.wait(ready, phase)
    total = _ds_product(dq.k, dq, number, consumer, 0, 2 * ROWS)
    rest = _ds_product(dq.k_t, dq, number, consumer, ROWS, ROWS)
    total, total_t = split_product(warpgroup_mma_wait(2, deps=[total]))
    offset = (dq_tile.to(gl.int64) * 2 + consumer) * (PIECE * ROWS)
    atomic_add_tile(dq.accums[1] + offset, total_t)
    rest = warpgroup_mma_wait(0, deps=[rest])
    mbarrier.arrive(dq.free.index(number % BUFFER_STAGES), count=1)
    atomic_add_tile(dq.accums[0] + offset, total + rest)  # mutate: atomic_add_tile


@gluon.jit
def _tile(accs, dq, inputs, program, at, consumer: gl.constexpr, CAUSAL: gl.constexpr, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_k / c and d_k_t / c, and what the tile before gives to d_q / c and d_q_t / c."""
    k, v, k_t, v_t = flat(inputs.resident)
    acc_k, acc_k_t = flat(accs)
    q_and_q_t, T_and_G = flat(inputs.streamed)
    stats = inputs.stats
    ROWS: gl.constexpr = q_and_q_t.shape[0] // 2
    TILE: gl.constexpr = accumulator(ROWS)
    WEIGHTS: gl.constexpr = left_operand(2 * CONSUMER_ROWS)
    zero = gl.zeros([CONSUMER_ROWS, 2 * ROWS], gl.float32, accumulator(2 * ROWS))
    s = warpgroup_mma(addressed_here(k), addressed_here(q_and_q_t).permute((1, 0)), zero, use_acc=False, is_async=True)
    a = warpgroup_mma(addressed_here(v), addressed_here(T_and_G).permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = row_statistic(stats, LSE, TILE)
    s, s_t = split_product(warpgroup_mma_wait(1, deps=[s]))
    q, q_t = split_rows(q_and_q_t)
    s_t = warpgroup_mma(addressed_here(k_t), q.permute((1, 0)), s_t + 0.0, is_async=True)
    p = probabilities_of_keys(s, lse, program.scale, inputs.bias, inputs.passed, TILE)
    if CAUSAL:
        p = where_causal(p, at.tile, program, consumer, TILE)
    if len(dq) > 0 and len(inputs.mask) == 0 and len(inputs.bias) == 0:
        p = where_key_exists(p, program, consumer, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)  # mutate: p
    keep_above(inputs.passed)
    row_a = row_statistic(stats, ROW_A, TILE)
    a, b = split_product(warpgroup_mma_wait(1, deps=[a]))
    T = split_rows(T_and_G)[0]
    b = warpgroup_mma(addressed_here(v_t), T.permute((1, 0)), b - row_statistic(stats, ROW_DELTA, TILE), is_async=True)
    centred = a - row_a
    ds_t = (p * centred).to(q.dtype)
    weights_t = gl.convert_layout(ds_t, WEIGHTS)
    keep_above(inputs.passed)
    q, q_t = split_rows(q_and_q_t)
    acc_k_t = warpgroup_mma(weights_t, q, acc_k_t, is_async=True)
    acc_k = warpgroup_mma(weights_t, q_t, acc_k, is_async=True)
    mu = row_statistic(stats, MU, TILE)
    s_t = warpgroup_mma_wait(3, deps=[s_t])
    s_t = s_t * program.scale - mu
    b = warpgroup_mma_wait(2, deps=[b])
    ds = (p * (s_t * centred + b)).to(q.dtype)
    q, q_t = split_rows(q_and_q_t)
    acc_k = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), q, acc_k, is_async=True)
    if len(dq) > 0:
        ds_pair = gl.join(ds, ds_t).permute((0, 2, 1)).reshape([CONSUMER_ROWS, 2 * ROWS])
        store_ds(dq, (gl.convert_layout(ds_pair, accumulator(2 * ROWS)),), at.iteration + 1, consumer)
        _add_dq(dq, at.before, at.iteration, consumer)
    return warpgroup_mma_wait(0, deps=[acc_k, acc_k_t])


@gluon.jit
def consume(
    program, dq, consumer: gl.constexpr, CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
    stream: gl.constexpr = stream_queries,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    like = program.pipeline.resident[: len(program.outs)]
    accs, register_operands = begin(program, consumer, like)
    accs, before, iteration = stream(
        _tile, accs, dq, register_operands, program, consumer, 1, CAUSAL, VARIES, BIAS_LAYOUT
    )
    if len(dq) > 0:
        if iteration > 0:
            _add_dq(dq, before, iteration, consumer)
        await_readers(dq)
    store_results(program, scaled(accs, program.scale), consumer, 1, D_K, 2)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_pairs_kernel(
    k, v, k_t, v_t, q, q_t, T, G, stats, d_k, d_k_t, d_q, d_q_t, mask, bias, log_l, tensor_scales,
    scale, M, N, heads, group,
    DQ_ACCUM: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr,
    BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 128 keys of one key head against all queries of its heads.

    With DQ_ACCUM, d_q and d_q_t are accumulators, in a layout that backward_postprocess.py knows.
    """
    ROWS: gl.constexpr = q.block_shape[-2]
    resident = (k, v, k_t, v_t)
    streamed = (q, q_t, T, G)
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = key_block(M, N, heads, group, ROWS, CAUSAL)
    pipeline = allocate_pipeline(resident, streamed, (stats,), STAGES, allocate_pairs)
    done = make_barriers(1, 2)
    dq = ()
    if DQ_ACCUM:
        dq = allocate_dq((d_q, d_q_t), pipeline, done)
    fence_async_shared()
    program = Program(
        (d_k, d_k_t),
        pipeline,
        optional(mask),
        bias_operand(bias, log_l),
        optional(tensor_scales),
        block,
        loop,
        scale,
        M,
        N,
    )
    gl.warp_specialize(
        [
            (produce, (resident, streamed, (stats,), pipeline, block, loop, 1, load_pairs)),
            (consume, (program, dq, 0, CAUSAL, VARIES, BIAS_LAYOUT)),
            (consume, (program, dq, 1, CAUSAL, VARIES, BIAS_LAYOUT)),
        ],
        [4, 4],
        [240, 240],
    )
