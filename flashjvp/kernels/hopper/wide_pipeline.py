"""The pipeline of head dims above 128: 64 resident rows for two consumers, which share the work on them.

Two accumulators of 64 x 256 take all registers of a warpgroup. So both consumers have the same rows, and each has one
column chunk of the results. Of the products for scores each computes other ones, all columns of them: if they split the
columns, both would read the same left operands from shared memory. They exchange what they need of each other
(wide_exchange.py).

There is shared memory for few stages of streamed tiles. So two of the four streamed tensors come and go apart from the
other two, with barriers of their own: a kernel's `first` tiles are loaded while it works on its `second` ones.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .bias import bias_by_key, bias_of_head, load_bias_by_query
from .blocks import unmasked_tiles
from .chunks import by_tensor, zero
from .packed_mask import load_mask_tile, packed_by_query
from .pipeline import (
    STATISTICS,
    allocate_tiles,
    as_matrix,
    barrier_of,
    bytes_of,
    load_chunks,
    load_resident,
    make_barriers,
    resident_rows,
    streamed_rows,
)
from .triton_compat import load_tile, store_tile

CHUNKS = gl.constexpr(2)  # column chunks of a tensor, one for each consumer


class Streamed(NamedTuple):
    """Streamed tiles in shared memory that come and go together, and their barriers."""

    tiles: Any  # of each tensor a tile for each stage
    full: Any  # the tiles of a stage have landed
    empty: Any  # its readers are through with a stage


class WidePipeline(NamedTuple):
    """A program's tiles in shared memory, and their barriers."""

    resident: Any  # of each resident tensor one tile
    resident_full: Any
    first: Any  # Streamed: what a kernel's tile reads first
    second: Any  # Streamed
    stats: Any  # (the statistics of the streamed rows, which come with `second`,), or ()
    exchange: Any  # wide_exchange.py


class WideInputs(NamedTuple):
    """What `add_tile` reads. Of each tensor the column chunks are a tuple.

    The masks are for the consumer that computes P. The other one reads neither, so the compiler drops its loads.
    """

    resident: Any
    first: Any
    second: Any
    stats: Any
    mask: Any  # (words of the packed mask,), or ()
    bias: Any  # the tile of the additive mask (bias.py), or ()
    exchange: Any
    iteration: Any
    first_full: Any  # (barrier, phase) for which `add_tile` waits before it reads `first`
    first_empty: Any  # the barrier at which it arrives when it is through with `first`
    second_full: Any  # (barrier, phase) for which it waits before it reads `second` or `stats`; for `keep_above`


@gluon.jit
def _allocate_streamed(tensors, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Shared memory and barriers for STAGES tiles of each tensor, read by so many consumers."""
    tiles = allocate_tiles(tensors, STAGES)
    full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, READERS)
    return Streamed(tiles, full, empty)


@gluon.jit
def allocate_wide_pipeline(resident, first, second, stats, exchange, STAGES: gl.constexpr, FIRST_READERS: gl.constexpr):
    """The pipeline for tiles as these descriptors have them. FIRST_READERS consumers read `first`, both `second`."""
    resident_tiles = allocate_tiles(resident, 1)
    stats_tiles = allocate_tiles(stats, STAGES)
    resident_full = make_barriers(1, 1)
    of_first = _allocate_streamed(first, STAGES, FIRST_READERS)
    of_second = _allocate_streamed(second, STAGES, 2)
    return WidePipeline(resident_tiles, resident_full, of_first, of_second, stats_tiles, exchange)


@gluon.jit
def _awaited_stage(streamed, tensors, iteration, MORE_BYTES: gl.constexpr):
    """(Stage, barrier) of the tiles of an iteration, once its readers are through with what was there."""
    stage = iteration % streamed.full.shape[0]
    bar = streamed.full.index(stage)
    empty, phase = barrier_of(streamed.empty, iteration)
    mbarrier.wait(empty, phase ^ 1)  # mutate: mbarrier.wait
    mbarrier.expect(bar, bytes_of(streamed.tiles, tensors) + MORE_BYTES)
    return stage, bar


@gluon.jit
def produce_wide(resident, first, second, stats, pipeline, block, loop):
    """The producer: copies the resident tiles, then the streamed tiles of every head of the loop, in order.

    `stats`, if it is given, holds the statistics of the streamed rows, [batch * heads * 4, rows].
    """
    ROWS: gl.constexpr = first[0].block_shape[2]
    STATS_BYTES: gl.constexpr = len(stats) * STATISTICS * ROWS * 4
    load_resident(resident, pipeline, block, CHUNKS)
    iteration = 0
    for member in range(loop.heads):
        head = loop.head + member
        for tile in range(loop.first, loop.end):
            stage, bar = _awaited_stage(pipeline.first, first, iteration, 0)
            load_chunks(first, pipeline.first.tiles, stage, bar, block.batch, head, tile * ROWS, CHUNKS)
            stage, bar = _awaited_stage(pipeline.second, second, iteration, STATS_BYTES)
            load_chunks(second, pipeline.second.tiles, stage, bar, block.batch, head, tile * ROWS, CHUNKS)
            if len(stats) > 0:
                number = block.batch * loop.query_heads + head  # mutate: number (1)
                load_tile(stats[0], [number * STATISTICS, tile * ROWS], bar, pipeline.stats[0].index(stage))
            iteration += 1


@gluon.jit
def begin_wide(program, outs):
    """Accumulators of zeros for these results, once the resident tiles are there."""
    pipeline = program.pipeline
    accs = ()
    for i in gl.static_range(len(outs)):
        accs = accs + (zero(outs[i].block_shape[3]),)
    mbarrier.wait(pipeline.resident_full.index(0), 0)
    return accs


@gluon.jit
def _inputs(pipeline, mask, bias, iteration):
    """What `add_tile` reads in an iteration."""
    stage = iteration % pipeline.first.full.shape[0]
    tiles = stage + (iteration >> 30)  # addresses of a single stage are not made before the loop, either: resident_rows
    stats = ()
    if len(pipeline.stats) > 0:
        stats = pipeline.stats[0].index(stage)
    return WideInputs(
        by_tensor(resident_rows(pipeline.resident, 0, iteration), CHUNKS),
        by_tensor(streamed_rows(pipeline.first.tiles, tiles), CHUNKS),
        by_tensor(streamed_rows(pipeline.second.tiles, tiles), CHUNKS),
        stats, mask, bias, pipeline.exchange, iteration, barrier_of(pipeline.first.full, iteration),
        pipeline.first.empty.index(stage), barrier_of(pipeline.second.full, iteration),
    )  # fmt: skip


@gluon.jit
def await_first(inputs):
    """Waits for the `first` tiles."""
    bar, phase = inputs.first_full
    mbarrier.wait(bar, phase)


@gluon.jit
def release_first(inputs):
    """This consumer is through with the `first` tiles: no product in flight reads them."""
    mbarrier.arrive(inputs.first_empty, count=1)


@gluon.jit
def await_second(inputs):
    """Waits for the `second` tiles and the statistics."""
    bar, phase = inputs.second_full
    mbarrier.wait(bar, phase)


@gluon.jit
def _stream_keys(
    add_tile: gl.constexpr, accs, state, program, first, end, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
    BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """`stream_keys_wide` for the tiles from `first` until before `end`, MASKED by position or not."""
    pipeline, row0 = program.pipeline, program.block.row0
    KEYS: gl.constexpr = pipeline.first.tiles[0].shape[3]
    STAGES: gl.constexpr = pipeline.second.full.shape[0]
    for tile in range(first, end):
        mask = load_mask_tile(program.mask, row0, tile, KEYS)
        bias = bias_by_key(program.bias, row0, tile, program.M, program.N, KEYS, BIAS_LAYOUT, MASKED)
        inputs = _inputs(pipeline, mask, bias, tile)
        accs, state = add_tile(accs, state, inputs, program, tile, CAUSAL, MASKED)
        mbarrier.arrive(pipeline.second.empty.index(tile % STAGES), count=1)
    return accs, state


@gluon.jit
def stream_keys_wide(
    add_tile: gl.constexpr, accs, state, program, CAUSAL: gl.constexpr, BIAS_LAYOUT: gl.constexpr
):  # fmt: skip
    """The mainloop of resident queries, over the tiles of keys. `state` has numbers of each query."""
    KEYS: gl.constexpr = program.pipeline.first.tiles[0].shape[3]
    end = program.loop.end
    unmasked = unmasked_tiles(program.block.row0, program.N, end, KEYS, CAUSAL)
    accs, state = _stream_keys(add_tile, accs, state, program, 0, unmasked, CAUSAL, False, BIAS_LAYOUT)
    return _stream_keys(add_tile, accs, state, program, unmasked, end, CAUSAL, True, BIAS_LAYOUT)


@gluon.jit
def stream_queries_wide(
    add_tile: gl.constexpr, accs, program, CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr
):  # fmt: skip
    """The mainloop of resident keys, over the tiles of queries of all heads of the group."""
    pipeline, block, loop = program.pipeline, program.block, program.loop
    M, N = program.M, program.N
    ROWS: gl.constexpr = pipeline.first.tiles[0].shape[3]
    STAGES: gl.constexpr = pipeline.second.full.shape[0]
    iteration = 0
    for member in range(loop.heads):
        head = loop.head + member
        packed_mask = packed_by_query(program.mask, block.batch, head, loop.query_heads, M, N, VARIES)
        for tile in range(loop.first, loop.end):
            mask = load_mask_tile(packed_mask, block.row0, tile, ROWS, True)  # mutate: mask
            number = block.batch * loop.query_heads + head  # mutate: number (2)
            bias = bias_of_head(program.bias, block.batch, head)  # mutate: bias
            bias = load_bias_by_query(bias, number, block.row0, tile, M, N, ROWS, BIAS_LAYOUT)
            inputs = _inputs(pipeline, mask, bias, iteration)
            accs = add_tile(accs, inputs, program, tile, CAUSAL)
            mbarrier.arrive(pipeline.second.empty.index(iteration % STAGES), count=1)
            iteration += 1
    return accs


@gluon.jit
def store_chunk(program, outs, values, CHUNK: gl.constexpr):
    """Writes one column chunk of the 64 rows of each result, through resident tiles that nobody reads any more."""
    block, tiles = program.block, program.pipeline.resident
    for i in gl.static_range(len(outs)):
        coordinates = [block.batch, block.head, block.row0, CHUNK * tiles[0].shape[4]]  # mutate: coordinates
        tile = tiles[2 * i + CHUNK].index(0)
        as_matrix(tile).store(values[i].to(outs[i].dtype))
        fence_async_shared()
        store_tile(outs[i], coordinates, tile)
        tma.store_wait(0)
