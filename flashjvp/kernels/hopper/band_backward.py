"""The backward kernels of windows and packed sequences: those of backward_query.py, backward_key.py, backward_value.py
and backward_pairs.py, over the rows within a band (band.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import backward_key, backward_pairs, backward_query, backward_value, dq_accum
from .band import produce_band, stream_band_keys, stream_band_queries
from .band_place import BLOCK_ROWS, moved, place_of_keys, place_of_queries
from .chunks import chunks
from .operands import key_operands, query_operands
from .pairs import allocate_narrow_pairs, allocate_pairs, are_pairs, load_pairs
from .pipeline import STATISTICS, Program, allocate_pipeline, allocate_tiles, load_chunks, make_barriers


@gluon.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def band_query_kernel(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, stats,
    d_q, d_q_rest, d_q_t, d_q_t_rest, cu, scale, low, high, M, N, heads, group,
    JVP: gl.constexpr, STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr,
):  # fmt: skip
    """`backward_query_kernel`: d_q and d_q_t of 128 queries of one head."""
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
    block, loop, band = place_of_queries(cu, low, high, M, N, heads, group, KEYS)
    columns = M  # of a head's statistics
    if cu is not None:
        columns = gl.num_programs(0) // heads * BLOCK_ROWS
        stats = moved(stats, block, heads * STATISTICS, band.column, columns)
    pipeline = allocate_pipeline(resident, streamed, (), STAGES, ALLOCATE)
    fence_async_shared()
    program = Program(outs, pipeline, (band,), (), (), block, loop, scale, columns, N)
    STREAM: gl.constexpr = stream_band_keys
    gl.warp_specialize(
        [
            (produce_band, (resident, streamed, (), pipeline, block, loop, band, CHUNKS, LOAD)),
            (backward_query.consume, (program, stats, 0, JVP, False, REGISTER_OPERANDS, (), STREAM)),
            (backward_query.consume, (program, stats, 1, JVP, False, REGISTER_OPERANDS, (), STREAM)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too


@gluon.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def band_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, d_q, d_q_t, cu, scale, low, high,
    M, N, heads, group, JVP: gl.constexpr, WITH_DV: gl.constexpr, DQ_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    REGISTER_OPERANDS: gl.constexpr, SUB_TILES: gl.constexpr, BUFFER_STAGES: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """`backward_key_kernel`: the gradients of 128 keys of one key head; with DQ_COLUMNS also sums of d_q and d_q_t."""
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
    block, loop, band = place_of_keys(cu, low, high, M, N, heads, group, ROWS)  # mutate: block, loop, band
    pipeline = allocate_pipeline(resident, streamed, (stats,), STAGES, ALLOCATE)
    dq = ()
    if DQ_COLUMNS > 0:
        k_tiles, k_t_tiles = pipeline.resident[:CHUNKS], pipeline.resident[2 * CHUNKS : 3 * CHUNKS]
        dq = dq_accum.allocate((d_q, d_q_t), k_tiles, k_t_tiles, ROWS, SUB_TILES, BUFFER_STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, (band,), (), (), block, loop, scale, M, N)
    STREAM: gl.constexpr = stream_band_queries
    gl.warp_specialize(
        [
            (produce_band, (resident, streamed, (stats,), pipeline, block, loop, band, CHUNKS, LOAD)),
            (
                backward_key.consume,
                (program, dq, 0, CHUNKS, JVP, False, REGISTER_OPERANDS, SUB_TILES, (), (), DQ_COLUMNS, STREAM),
            ),
            (
                backward_key.consume,
                (program, dq, 1, CHUNKS, JVP, False, REGISTER_OPERANDS, SUB_TILES, (), (), DQ_COLUMNS, STREAM),
            ),
        ],
        [4, 4],
        [240, 240],
    )


@gluon.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def band_value_kernel(
    k, k_rest, k_t, k_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats, d_v, d_v_rest, d_v_t, d_v_t_rest,
    cu, scale, low, high, M, N, heads, group, STAGES: gl.constexpr,
):  # fmt: skip
    """`backward_value_kernel`: d_v and d_v_t of 128 keys of one key head."""
    resident = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest)
    outs = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    CHUNKS: gl.constexpr = len(resident) // 2
    ROWS: gl.constexpr = q.block_shape[-2]
    gdc_launch_dependents()
    block, loop, band = place_of_keys(cu, low, high, M, N, heads, group, ROWS)
    pipeline = allocate_pipeline(resident, streamed, (stats,), STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, (band,), (), (), block, loop, scale, M, N)
    STREAM: gl.constexpr = stream_band_queries
    gl.warp_specialize(
        [
            (produce_band, (resident, streamed, (stats,), pipeline, block, loop, band, CHUNKS)),
            (backward_value.consume, (program, 0, False, (), (), STREAM)),
            (backward_value.consume, (program, 1, False, (), (), STREAM)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too


@gluon.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def band_pairs_kernel(
    k, v, k_t, v_t, q, q_t, T, G, stats, d_k, d_k_t, d_q, d_q_t, cu, scale, low, high, M, N, heads, group,
    DQ_ACCUM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`backward_pairs_kernel`: d_k and d_k_t of 128 keys of one key head; with DQ_ACCUM also sums of d_q and d_q_t."""
    ROWS: gl.constexpr = q.block_shape[-2]
    resident = (k, v, k_t, v_t)
    streamed = (q, q_t, T, G)
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    block, loop, band = place_of_keys(cu, low, high, M, N, heads, group, ROWS)
    pipeline = allocate_pipeline(resident, streamed, (stats,), STAGES, allocate_pairs)
    done = make_barriers(1, 2)
    dq = ()
    if DQ_ACCUM:
        dq = backward_pairs.allocate_dq((d_q, d_q_t), pipeline, done)
    fence_async_shared()
    program = Program((d_k, d_k_t), pipeline, (band,), (), (), block, loop, scale, M, N)
    LOAD: gl.constexpr = load_pairs
    STREAM: gl.constexpr = stream_band_queries
    gl.warp_specialize(
        [
            (produce_band, (resident, streamed, (stats,), pipeline, block, loop, band, 1, LOAD)),
            (backward_pairs.consume, (program, dq, 0, False, (), (), STREAM)),
            (backward_pairs.consume, (program, dq, 1, False, (), (), STREAM)),
        ],
        [4, 4],
        [240, 240],
    )
