"""The kernel of d_k, d_k_t, d_v and d_v_t of the resident keys in one pass over query tiles; it can accumulate d_q and
d_q_t, too; MATH.md (1)-(6), (9)-(20).

A program has 64 keys, and both consumers work on them and on the same tile of queries. The first computes S and S_t and
has d_v and d_v_t; the second computes A and B and has d_k and d_k_t. So no product is computed twice, and each has
registers for its two accumulators. The first gives P and S_t - mu, the second dS and dS_t (one_pass_exchange.py); then
each adds to one of d_q and d_q_t, in float32 and in any order. Tiles are [keys, queries].
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import CONSUMER_ROWS, key_block, where_key_exists
from .chunks import add_product, add_scores, by_tensor, chunks, complete, left_operands, scaled, zero, zeros
from .dq_accum import atomic_add_tile, without_padding
from .mainloop import stage_of
from .one_pass_exchange import (
    DS,
    DS_T,
    P,
    Z,
    allocate_exchange,
    await_ds,
    await_free,
    await_given,
    ds_of_queries,
    give,
    give_ds,
    load_numbers,
    release,
    store_numbers,
)
from .packed_mask import where_allowed
from .pipeline import (
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    Pipeline,
    Program,
    accumulator,
    allocate_tiles,
    keep_above,
    make_barriers,
    produce,
    resident_rows,
    row_statistic,
    streamed_rows,
)
from .results import store_results
from .triton_compat import addressed_here, made_here


class Inputs(NamedTuple):
    """What a tile's function reads. Of each tensor the column chunks are a tuple."""

    resident: Any  # of the first consumer k, k_t, v, v_t; of the second v, v_t, k, k_t
    streamed: Any  # q, G, q_t, T
    stats: Any  # [4, streamed rows]
    mask: Any  # of the first consumer (words of a packed mask,), or ()
    dq_tile: Any  # its number among those of all heads
    iteration: Any
    passed: Any  # (barrier, phase) of the tile, for `keep_above`
    empty: Any  # the barrier at which a consumer arrives when it is through with the streamed tiles


@gluon.jit
def _add_ds_product(totals, which: gl.constexpr, keys, exchange, inputs, USE_ACC: gl.constexpr = True):
    """In flight: each chunk's total + dS.T @ keys, or dS_t.T @ keys."""
    found = ()
    for i in gl.static_range(len(keys)):
        ds = ds_of_queries(exchange, which, inputs.iteration)
        found = found + (warpgroup_mma(ds, addressed_here(keys[i]), totals[i], use_acc=USE_ACC, is_async=True),)
    return found


@gluon.jit
def _dq_product(k, k_t, exchange, inputs, TANGENT: gl.constexpr):
    """In flight: what the tile gives to d_q / c (15), or with TANGENT to d_q_t / c (18)."""
    totals = ()
    for i in gl.static_range(len(k)):
        totals = totals + (zero(k[i].shape[1]),)
    if TANGENT:
        totals = _add_ds_product(totals, DS_T, k, exchange, inputs, USE_ACC=False)
    else:
        totals = _add_ds_product(totals, DS, k, exchange, inputs, USE_ACC=False)
        totals = _add_ds_product(totals, DS_T, k_t, exchange, inputs)  # mutate: totals
    return totals


@gluon.jit
def _add_to(dq_accum, totals, tile, COLUMNS: gl.constexpr):
    """Adds the chunks to those of tile `tile` of all heads, of COLUMNS columns in all."""
    FIRST: gl.constexpr = totals[0].shape[1]
    first = tile.to(gl.int64) * (CONSUMER_ROWS * COLUMNS)  # mutate: first
    for i in gl.static_range(len(totals)):
        total = without_padding(totals[i], COLUMNS - FIRST) if i > 0 else totals[i]
        atomic_add_tile(dq_accum + (first + i * CONSUMER_ROWS * FIRST), total)


@gluon.jit
def _tile_of_scores(accs, exchange, dq_accums, inputs, program, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_v, d_v_t and d_q_t / c."""
    acc_v, acc_v_t = accs
    k, k_t, _v, _v_t = inputs.resident
    q, G, q_t, T = inputs.streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    nothing = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    s = add_scores(nothing, k, q, USE_ACC=False)
    s_t = add_scores(nothing, k_t, q, USE_ACC=False)
    s_t = add_scores(s_t, k, q_t)
    lse = row_statistic(inputs.stats, LSE, TILE)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p = gl.exp2(s * (program.scale * 1.4426950408889634) - lse)
    if DQ_COLUMNS > 0:
        p = where_key_exists(p, program, 0, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    weights = left_operands(p.to(q[0].dtype), q)
    keep_above(inputs.passed)
    acc_v_t = add_product(acc_v_t, weights, T)
    acc_v = add_product(acc_v, weights, G)
    await_free(exchange, inputs.iteration)
    store_numbers(exchange, P, p)
    mu = row_statistic(inputs.stats, MU, TILE)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    z = s_t * program.scale - mu  # mutate: z
    store_numbers(exchange, Z, z)
    give(exchange)
    acc_v = add_product(acc_v, left_operands((p * z).to(q[0].dtype), q), T)
    accs = complete(acc_v + acc_v_t)
    mbarrier.arrive(inputs.empty, count=1)
    if DQ_COLUMNS > 0:
        await_ds(exchange, inputs.iteration)
        totals = complete(_dq_product(k, k_t, exchange, inputs, True))
        _add_to(dq_accums[1], totals, inputs.dq_tile, DQ_COLUMNS)
    return accs


@gluon.jit
def _tile_of_cotangents(accs, exchange, dq_accums, inputs, program, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_k / c, d_k_t / c and d_q / c."""
    acc_k, acc_k_t = accs
    v, v_t, k, k_t = inputs.resident
    q, G, q_t, T = inputs.streamed
    CHUNKS: gl.constexpr = len(q)
    ROWS: gl.constexpr = q[0].shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    nothing = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, TILE)
    a = add_scores(nothing, v, T, USE_ACC=False)
    b = add_scores(nothing, v, G, USE_ACC=False)
    b = add_scores(b, v_t, T)  # mutate: b
    row_a = row_statistic(inputs.stats, ROW_A, TILE)
    a = warpgroup_mma_wait(2 * CHUNKS, deps=[a])
    centred = a - row_a
    delta = row_statistic(inputs.stats, ROW_DELTA, TILE)
    b = warpgroup_mma_wait(0, deps=[b])
    b = b - delta  # mutate: b (2)
    await_given(exchange, inputs.iteration)
    b = made_here(load_numbers(exchange, Z) * centred + b)
    p = load_numbers(exchange, P)
    ds_t = made_here(p * centred).to(q[0].dtype)
    ds = made_here(p * b).to(q[0].dtype)
    if DQ_COLUMNS > 0:
        give_ds(exchange, ds, ds_t)
    else:
        keep_above(inputs.passed)
        release(exchange)
    weights_t = left_operands(ds_t, q)
    acc_k_t = add_product(acc_k_t, weights_t, q)
    acc_k = add_product(acc_k, weights_t, q_t)  # mutate: acc_k
    acc_k = add_product(acc_k, left_operands(ds, q), q)
    accs = complete(acc_k + acc_k_t)
    mbarrier.arrive(inputs.empty, count=1)
    if DQ_COLUMNS > 0:
        await_ds(exchange, inputs.iteration)
        totals = complete(_dq_product(k, k_t, exchange, inputs, False))
        release(exchange)
        _add_to(dq_accums[0], totals, inputs.dq_tile, DQ_COLUMNS)
    return accs


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
    ADD_TILE: gl.constexpr = _tile_of_scores if consumer == 0 else _tile_of_cotangents
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
    streamed_tiles, stats_tiles = allocate_tiles(streamed, STAGES), allocate_tiles((stats,), STAGES)
    resident_full, full, empty = make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    exchange = allocate_exchange(streamed[0])
    first = Pipeline(keys + values, streamed_tiles, stats_tiles, resident_full, full, empty, ())
    second = Pipeline(values + keys, streamed_tiles, stats_tiles, resident_full, full, empty, ())
    return first, second, exchange


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_one_pass_kernel(
    k, k_rest, k_t, k_t_rest, v, v_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_v, d_v_rest, d_v_t, d_v_t_rest, d_k, d_k_rest, d_k_t, d_k_t_rest, d_q, d_q_t, scale, M, N, heads, group,
    DQ_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head against all queries of its heads.

    A `_rest` is a tensor's second chunk, if it has one. DQ_COLUMNS is 0, or d_q and d_q_t are accumulated: it is then
    their number of columns, and backward_postprocess.py knows their layout.
    """
    of_keys = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    of_values = chunks(v, v_rest) + chunks(v_t, v_t_rest)
    streamed = chunks(q, q_rest) + chunks(G, G_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest)
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
    gl.warp_specialize(
        [
            (produce, (of_keys + of_values, streamed, (stats,), first, block, loop, CHUNKS)),
            (consume, (program, exchange, dq_accums, 0, CHUNKS, DQ_COLUMNS)),
            (consume, (program_of_keys, exchange, dq_accums, 1, CHUNKS, DQ_COLUMNS)),
        ],
        [4, 4],
        [240, 240],
    )
