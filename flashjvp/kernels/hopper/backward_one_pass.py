"""The kernel of d_k, d_k_t, d_v and d_v_t of the resident keys in one pass over query tiles; it can accumulate d_q and
d_q_t, too; MATH.md (1)-(6), (9)-(20).

A program has 64 keys, and both consumers work on them and on the same tile of queries. The first computes S and S_t and
has d_v and d_v_t; the second computes A and B and has d_k and d_k_t. So no product is computed twice, and each has
registers for its two accumulators. The first gives P and S_t - mu, the second dS and dS_t (one_pass_exchange.py); then
each adds to one of d_q and d_q_t, in float32 and in any order. Tiles are [keys, queries].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import key_block
from .chunks import by_tensor, chunks, scaled, zeros
from .mainloop import stage_of
from .one_pass_exchange import allocate_exchange, await_free
from .one_pass_tiles import Inputs, tile_of_cotangents, tile_of_scores
from .pairs import allocate_pairs, are_pairs, load_pairs
from .pipeline import (
    Pipeline,
    Program,
    allocate_tiles,
    load_chunks,
    make_barriers,
    produce,
    resident_rows,
    streamed_rows,
)
from .results import store_results


@gluon.jit
def add_queries(
    add_tile: gl.constexpr, accs, exchange, dq_accums, program, mask, dq_tile, iteration, CHUNKS: gl.constexpr,
    DQ_COLUMNS: gl.constexpr,
):  # fmt: skip
    """One iteration: awaits a tile of queries and adds it."""
    pipeline = program.pipeline
    stage, passed = stage_of(pipeline, iteration)
    bar, phase = passed
    mbarrier.wait(bar, phase)
    inputs = Inputs(
        by_tensor(resident_rows(pipeline.resident, 0, iteration), CHUNKS),
        by_tensor(streamed_rows(pipeline.streamed, stage + (iteration >> 30)), CHUNKS),
        pipeline.stats[0].index(stage), mask, dq_tile, iteration, passed, pipeline.empty.index(stage),
    )  # fmt: skip
    return add_tile(by_tensor(accs, CHUNKS), exchange, dq_accums, inputs, program, DQ_COLUMNS)


@gluon.jit
def _stream(
    add_tile: gl.constexpr, accs, exchange, dq_accums, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    DQ_COLUMNS: gl.constexpr,
):  # fmt: skip
    """The mainloop, over the tiles of queries of all heads of the group. Returns the number of iterations, too."""
    block, loop = program.block, program.loop
    iteration = 0
    dq_tile = (block.batch * loop.query_heads + loop.head) * loop.end
    for _member in range(loop.heads):
        for _tile in range(loop.end):
            accs = add_queries(
                add_tile, accs, exchange, dq_accums, program, (), dq_tile, iteration, CHUNKS, DQ_COLUMNS
            )  # fmt: skip
            iteration += 1
            dq_tile += 1  # mutate: dq_tile
    return accs, iteration


@gluon.jit
def consume(
    program, exchange, dq_accums, consumer: gl.constexpr, CHUNKS: gl.constexpr, DQ_COLUMNS: gl.constexpr,
    stream: gl.constexpr = _stream,
):  # fmt: skip
    """A consumer: d_v and d_v_t, or d_k and d_k_t, of 64 keys."""
    ADD_TILE: gl.constexpr = tile_of_scores if consumer == 0 else tile_of_cotangents
    accs = zeros(program.pipeline.resident[: len(program.outs)])
    mbarrier.wait(program.pipeline.resident_full.index(0), 0)
    accs, iterations = stream(ADD_TILE, accs, exchange, dq_accums, program, consumer, CHUNKS, DQ_COLUMNS)
    if consumer == 0:
        if DQ_COLUMNS > 0:
            await_free(exchange, iterations)  # results are written through tiles that the other consumer reads
        store_results(program, accs, 0, CHUNKS, 0, 0)
    else:
        store_results(program, scaled(accs, program.scale), 0, CHUNKS, 0, 0)  # mutate: store_results


@gluon.jit
def allocate_one_pass(of_keys, of_values, streamed, stats, STAGES: gl.constexpr):
    """The pipeline as the first and as the second consumer see it, and what they exchange. A consumer's own resident
    tiles come first: results are written through them."""
    keys, values = allocate_tiles(of_keys, 1), allocate_tiles(of_values, 1)
    ALLOCATE: gl.constexpr = allocate_pairs if are_pairs(of_keys, streamed) else allocate_tiles
    streamed_tiles, stats_tiles = ALLOCATE(streamed, STAGES), allocate_tiles((stats,), STAGES)
    resident_full, full, empty = make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    exchange = allocate_exchange(streamed[0])
    first = Pipeline(keys + values, streamed_tiles, stats_tiles, resident_full, full, empty, ())
    second = Pipeline(values + keys, streamed_tiles, stats_tiles, resident_full, full, empty, ())
    return first, second, exchange


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_one_pass_kernel(
    k, k_rest, k_t, k_t_rest, v, v_rest, v_t, v_t_rest, q, q_rest, q_t, q_t_rest, T, T_rest, G, G_rest, stats,
    d_v, d_v_rest, d_v_t, d_v_t_rest, d_k, d_k_rest, d_k_t, d_k_t_rest, d_q, d_q_t, scale, M, N, heads, group,
    DQ_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one. DQ_COLUMNS is 0, or d_q and d_q_t are accumulated: it is then
    their number of columns, and backward_postprocess.py knows their layout.
    """
    of_keys = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    of_values = chunks(v, v_rest) + chunks(v_t, v_t_rest)
    streamed = chunks(q, q_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest) + chunks(G, G_rest)
    outs_of_values = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    outs_of_keys = chunks(d_k, d_k_rest) + chunks(d_k_t, d_k_t_rest)
    CHUNKS: gl.constexpr = len(of_keys) // 2
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    block, loop = key_block(M, N, heads, group, ROWS, False, 1)
    first, second, exchange = allocate_one_pass(of_keys, of_values, streamed, stats, STAGES)
    fence_async_shared()
    dq_accums = ()
    if DQ_COLUMNS > 0:
        dq_accums = (d_q, d_q_t)
    program = Program(outs_of_values, first, (), (), (), block, loop, scale, M, N)
    program_of_keys = Program(outs_of_keys, second, (), (), (), block, loop, scale, M, N)
    LOAD: gl.constexpr = load_pairs if are_pairs(of_keys, streamed) else load_chunks
    gl.warp_specialize(
        [
            (produce, (of_keys + of_values, streamed, (stats,), first, block, loop, CHUNKS, LOAD)),
            (consume, (program, exchange, dq_accums, 0, CHUNKS, DQ_COLUMNS)),
            (consume, (program_of_keys, exchange, dq_accums, 1, CHUNKS, DQ_COLUMNS)),
        ],
        [4, 4],
        [240, 240],
    )
