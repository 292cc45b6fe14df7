"""The pipeline of the warp-specialised kernels: tiles in shared memory, the producer that fills them, their barriers.

A program has 128 resident rows, 64 for each of two consumer warpgroups, and streams tiles of the other side's rows. A
producer warp copies the resident tiles once by TMA and then fills the stages of the pipeline in turn. One barrier says
that a stage is full, another that both consumers are through with it. Tensors are [batch, heads, rows, D], copied by
chunks of columns (chunks.py); rows and columns beyond the end load as zeros and are not stored. The consumers' side is
in mainloop.py.

Products in flight at the end of a loop's body make ptxas serialise all of them. So every consumer waits for its own
there, and the tensor cores are kept busy by the other one.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .blocks import CONSUMER_ROWS
from .scales import SOFTMAX_SCALE
from .triton_compat import load_tile

STATISTICS = gl.constexpr(4)  # lse * log2(e) (with an additive mask m in nats), mu, row_a, row_delta
ENTRIES = gl.constexpr(1 << 30)  # the first coordinate of a tensor of packed sequences
LSE = gl.constexpr(0)
MU = gl.constexpr(1)
ROW_A = gl.constexpr(2)
ROW_DELTA = gl.constexpr(3)


class Pipeline(NamedTuple):
    """A program's tiles in shared memory, and their barriers."""

    resident: Any  # of each resident tensor a tile for each consumer
    streamed: Any  # of each streamed tensor a tile for each stage
    stats: Any  # (the statistics of the streamed rows, a tile for each stage,), or ()
    resident_full: Any  # the resident tiles have landed
    full: Any  # the tiles of a stage have landed
    empty: Any  # both consumers are through with a stage
    turn: Any  # (which item of a persistent program this is: persistent.py,), or ()


class Program(NamedTuple):
    """What both consumers of a program read."""

    outs: Any  # descriptors of the results
    pipeline: Any
    mask: Any  # the packed mask or (the plan of a block mask,), as the kernel's mainloop takes it, or ()
    bias: Any  # the additive mask, likewise (bias.py)
    tensor_scales: Any  # (numbers of per-tensor scaling,), or ()
    block: Any
    loop: Any
    scale: Any
    M: Any
    N: Any


@gluon.constexpr_function
def accumulator(width):
    """The register layout of a warpgroup's product: 64 rows, `width` columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def left_operand(width):
    """The layout of a left operand in registers, of a product with `width` columns."""
    return gl.DotOperandLayout(0, accumulator(width), 2)


@gluon.jit
def optional(x):
    """(x,), or () if x is None: partitions take no None."""
    if x is None:
        return ()
    else:
        return (x,)


@gluon.jit
def softmax_scale_of(tensor_scales, scale):
    """The softmax scale; under per-tensor scaling the one of the scaled q and k (per_tensor_scaling.py)."""
    if tensor_scales is None:
        return scale
    else:
        return gl.load(tensor_scales + SOFTMAX_SCALE)


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for ARRIVALS."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def allocate_tiles(tensors, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of each tensor."""
    tiles = ()
    for i in gl.static_range(len(tensors)):
        x = tensors[i]
        tiles = tiles + (gl.allocate_shared_memory(x.dtype, [COUNT] + x.block_shape[-4:], x.layout),)
    return tiles


@gluon.jit
def allocate_pipeline(
    resident, streamed, stats, STAGES: gl.constexpr, allocate_streamed: gl.constexpr = allocate_tiles
):
    """The pipeline for tiles as these descriptors have them, with STAGES stages."""
    resident_tiles = allocate_tiles(resident, 2)
    streamed_tiles = allocate_streamed(streamed, STAGES)
    stats_tiles = allocate_tiles(stats, STAGES)
    barriers = make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    return Pipeline(resident_tiles, streamed_tiles, stats_tiles, barriers[0], barriers[1], barriers[2], ())


@gluon.jit
def barrier_of(barriers, number):
    """(The barrier of a tile, the phase that it completes): tiles take the stages in turn, and each turn is a phase."""
    STAGES: gl.constexpr = barriers.shape[0]
    return barriers.index(number % STAGES), (number // STAGES) & 1


@gluon.constexpr_function
def rows_of_a_tile(resident, streamed):
    """Rows of each tensor in a streamed tile, of these tiles in shared memory. Pairs (pairs.py), of which there are
    fewer than resident tensors, share theirs."""
    return streamed[0].shape[3] // (2 if len(streamed) < len(resident) else 1)


@gluon.jit
def as_matrix(tile):
    """A tile [1, 1, rows, D] as [rows, D]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def resident_number(pipeline, consumer):
    """Which of the resident tiles of each tensor is a consumer's."""
    if len(pipeline.turn) > 0:
        return pipeline.turn[0].first + consumer
    else:
        return consumer


@gluon.jit
def await_resident(pipeline, consumer):
    """Waits until the resident tiles have landed."""
    if len(pipeline.turn) > 0:
        # mutate: mbarrier.wait (2)
        mbarrier.wait(pipeline.resident_full.index(resident_number(pipeline, consumer)), pipeline.turn[0].phase)
    else:
        mbarrier.wait(pipeline.resident_full.index(0), 0)


@gluon.jit
def resident_rows(tiles, number, iteration):
    """One of the resident tiles of each tensor, a consumer's half. Their addresses depend on `iteration` (never 2^30),
    the loop's counter, and so are made where they are used; made before the loop, they would take registers all the
    time."""
    rows = ()
    for i in gl.static_range(len(tiles)):
        rows = rows + (as_matrix(tiles[i].index(number + (iteration >> 30))),)
    return rows


@gluon.jit
def load_register_operands(tiles, number, COLUMNS: gl.constexpr):
    """One of the resident tiles of each tensor, a consumer's half, in registers: left operands of products with COLUMNS
    columns."""
    rows = ()
    for i in gl.static_range(len(tiles)):
        rows = rows + (as_matrix(tiles[i].index(number)).load(left_operand(COLUMNS)),)
    return rows


@gluon.jit
def streamed_rows(pipeline, stage):
    """The streamed tiles in one stage of the pipeline."""
    rows = ()
    for i in gl.static_range(len(pipeline)):
        rows = rows + (as_matrix(pipeline[i].index(stage)),)
    return rows


@gluon.jit
def sub_tile_rows(tiles, sub_tile: gl.constexpr, SUB_TILES: gl.constexpr):
    """One of SUB_TILES equal pieces of each tile's rows."""
    if SUB_TILES == 1:
        return tiles
    else:
        rows = ()
        for i in gl.static_range(len(tiles)):
            rows = rows + (
                tiles[i].slice(sub_tile * (tiles[i].shape[0] // SUB_TILES), tiles[i].shape[0] // SUB_TILES, 0),
            )  # mutate: rows
        return rows


@gluon.jit
def keep_above(passed):
    """Keeps what comes before it before what comes after it: ptxas moves arithmetic behind the next wait for products,
    where nothing overlaps it, but not over a wait for a barrier, even one that has been passed: (barrier, phase)."""
    bar, phase = passed
    mbarrier.wait(bar, phase)


@gluon.jit
def row_statistic(tile, which: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, rows] of a streamed tile's statistics [4, rows], to broadcast to [64, rows]."""
    return tile.slice(which, 1, 0).load(LAYOUT)


@gluon.constexpr_function
def bytes_of(tiles, tensors):
    """The bytes of one of the tiles [..., rows, D] of each kind, into which these tensors are copied."""
    *_, rows, columns = tensors[0].block_shape
    return sum([x.shape[3] * x.shape[4] for x in tiles]) * tensors[0].block_type.nbytes // (rows * columns)


@gluon.jit
def copy_tile(x, batch, head, row, column, bar, tile):
    """Starts the copy of a tile of one head; of five dims the first one moves all rows (sequences_descriptors)."""
    if len(x.block_shape) == 4:
        load_tile(x, [batch, head, row, column], bar, tile)
    else:
        load_tile(x, [ENTRIES, batch, head, row, column], bar, tile)


@gluon.jit
def load_resident(resident, pipeline, block, CHUNKS: gl.constexpr):
    """Starts the copies of the resident tiles; `resident_full` completes when they have landed."""
    WIDTH: gl.constexpr = resident[0].block_shape[-1]
    CONSUMERS: gl.constexpr = pipeline.resident[0].shape[0]
    bar = pipeline.resident_full.index(0)
    mbarrier.expect(bar, CONSUMERS * bytes_of(pipeline.resident, resident))
    for i in gl.static_range(len(resident)):
        for consumer in gl.static_range(CONSUMERS):
            row = block.row0 + consumer * CONSUMER_ROWS
            tile = pipeline.resident[i].index(consumer)
            copy_tile(resident[i], block.batch, block.head, row, i % CHUNKS * WIDTH, bar, tile)


@gluon.jit
def load_chunks(streamed, tiles, stage, bar, batch, head, row, CHUNKS: gl.constexpr):
    """Starts the copies of one stage's tiles: a tile for each column chunk."""
    WIDTH: gl.constexpr = streamed[0].block_shape[-1]
    for i in gl.static_range(len(streamed)):
        # mutate: copy_tile
        copy_tile(streamed[i], batch, head, row, i % CHUNKS * WIDTH, bar, tiles[i].index(stage))


@gluon.jit
def load_stage(
    streamed, stats, pipeline, iteration, batch, head, query_heads, row, CHUNKS: gl.constexpr,
    load_streamed: gl.constexpr,
):  # fmt: skip
    """Starts the copies of the tiles of an iteration, the rows from `row` on of one head, once their stage is free."""
    ROWS: gl.constexpr = streamed[0].block_shape[-2]
    BYTES: gl.constexpr = bytes_of(pipeline.streamed, streamed) + len(stats) * STATISTICS * ROWS * 4
    STAGES: gl.constexpr = pipeline.full.shape[0]
    stage = iteration % STAGES
    bar = pipeline.full.index(stage)
    empty, phase = barrier_of(pipeline.empty, iteration)
    mbarrier.wait(empty, phase ^ 1)  # mutate: mbarrier.wait
    mbarrier.expect(bar, BYTES)
    load_streamed(streamed, pipeline.streamed, stage, bar, batch, head, row, CHUNKS)
    if len(stats) > 0:
        number = batch * query_heads + head  # mutate: number
        load_tile(stats[0], [number * STATISTICS, row], bar, pipeline.stats[0].index(stage))


@gluon.jit
def produce(
    resident, streamed, stats, pipeline, block, loop, CHUNKS: gl.constexpr, load_streamed: gl.constexpr = load_chunks
):
    """The producer: copies the resident tiles, then the streamed tiles of every head of the loop, in order.

    `stats`, if it is given, holds the statistics of the streamed rows, [batch * heads * 4, rows].
    """
    ROWS: gl.constexpr = streamed[0].block_shape[-2]
    load_resident(resident, pipeline, block, CHUNKS)
    iteration = 0
    for member in range(loop.heads):
        for tile in range(loop.first, loop.end):
            load_stage(
                streamed, stats, pipeline, iteration, block.batch, loop.head + member, loop.query_heads, tile * ROWS,
                CHUNKS, load_streamed,
            )  # fmt: skip
            iteration += 1
