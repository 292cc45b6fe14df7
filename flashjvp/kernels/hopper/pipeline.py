"""The pipeline of the warp-specialised kernels: tiles in shared memory, the producer that fills them, their barriers.

A program has 128 resident rows, 64 for each of two consumer warpgroups, and streams tiles of the other side's rows. A
producer warp copies the resident tiles once by TMA and then fills the stages of the pipeline in turn. One barrier says
that a stage is full, another that both consumers are through with it. Tensors are [batch, heads, rows, D], copied by
chunks of columns (chunks.py); rows and columns beyond the end load as zeros and are not stored.

Products in flight at the end of a loop's body make ptxas serialise all of them. So every consumer waits for its own
there, and the tensor cores are kept busy by the other one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .blocks import CONSUMER_ROWS
from .scales import SOFTMAX_SCALE
from .triton_compat import load_tile

STATISTICS = gl.constexpr(4)  # lse * log2(e), mu, row_a, row_delta
LSE = gl.constexpr(0)
MU = gl.constexpr(1)
ROW_A = gl.constexpr(2)
ROW_DELTA = gl.constexpr(3)


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
        tiles = tiles + (gl.allocate_shared_memory(x.dtype, [COUNT] + x.block_shape, x.layout),)
    return tiles


@gluon.jit
def allocate_pipeline(resident, streamed, stats, STAGES: gl.constexpr):
    """Shared memory of a program: (resident tiles, stages of streamed tiles, stages of their statistics), and barriers.

    Barriers say that the resident tiles are there, that a stage is full, and that both consumers are through with it.
    """
    tiles = (allocate_tiles(resident, 2), allocate_tiles(streamed, STAGES), allocate_tiles(stats, STAGES))
    return tiles, (make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2))


@gluon.jit
def as_matrix(tile):
    """A tile [1, 1, rows, D] as [rows, D]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def resident_rows(tiles, consumer, iteration):
    """A consumer's half of the resident tiles. Their addresses depend on `iteration` (never 2^30), the loop's counter,
    and so are made where they are used; made before the loop, they would take registers all the time."""
    rows = ()
    for i in gl.static_range(len(tiles)):
        rows = rows + (as_matrix(tiles[i].index(consumer + (iteration >> 30))),)
    return rows


@gluon.jit
def load_register_operands(tiles, consumer, COLUMNS: gl.constexpr):
    """A consumer's half of resident tiles in registers: left operands of products with COLUMNS columns."""
    rows = ()
    for i in gl.static_range(len(tiles)):
        rows = rows + (as_matrix(tiles[i].index(consumer)).load(left_operand(COLUMNS)),)
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
    mbarrier.wait(passed[0], passed[1])


@gluon.jit
def row_statistic(tile, which: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, rows] of a streamed tile's statistics [4, rows], to broadcast to [64, rows]."""
    return tile.slice(which, 1, 0).load(LAYOUT)


@gluon.constexpr_function
def bytes_of(tensors, CHUNKS):
    """The bytes of one tile of each tensor; a tensor's column chunks lie side by side."""
    return len(tensors) // CHUNKS * sum([x.block_type.nbytes for x in tensors[:CHUNKS]])


@gluon.jit
def load_resident(resident, resident_tiles, resident_full, block, CHUNKS: gl.constexpr):
    """Starts the copies of the resident tiles; `resident_full` completes when they have landed."""
    batch, head, row0 = block
    WIDTH: gl.constexpr = resident[0].block_shape[3]
    mbarrier.expect(resident_full.index(0), 2 * bytes_of(resident, CHUNKS))
    for i in gl.static_range(len(resident)):
        for consumer in gl.static_range(2):
            coordinates = [batch, head, row0 + consumer * CONSUMER_ROWS, i % CHUNKS * WIDTH]
            load_tile(resident[i], coordinates, resident_full.index(0), resident_tiles[i].index(consumer))


@gluon.jit
def produce(
    resident, streamed, stats, resident_tiles, pipeline, stats_pipeline, barriers, block, loop, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: copies the resident tiles, then the streamed tiles of every head of the loop, in order.

    `stats`, if it is given, holds the statistics of the streamed rows, [batch * heads * 4, rows].
    """
    resident_full, full, empty = barriers
    batch = block[0]
    streamed_head, streamed_heads, first, last, heads = loop
    WIDTH: gl.constexpr = streamed[0].block_shape[3]
    ROWS: gl.constexpr = streamed[0].block_shape[2]
    BYTES: gl.constexpr = bytes_of(streamed, CHUNKS) + len(stats) * STATISTICS * ROWS * 4
    load_resident(resident, resident_tiles, resident_full, block, CHUNKS)
    iteration = 0
    for member in range(streamed_heads):
        for tile in range(first, last):
            stage = iteration % STAGES
            bar = full.index(stage)
            # mutate: mbarrier.wait
            mbarrier.wait(empty.index(stage), ((iteration // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(len(streamed)):
                head = streamed_head + member
                # mutate: load_tile
                load_tile(streamed[i], [batch, head, tile * ROWS, i % CHUNKS * WIDTH], bar, pipeline[i].index(stage))
            if len(stats) > 0:
                number = batch * heads + streamed_head + member  # mutate: number
                load_tile(stats[0], [number * STATISTICS, tile * ROWS], bar, stats_pipeline[0].index(stage))
            iteration += 1
