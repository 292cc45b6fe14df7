"""What the warp-specialised kernels share: tiles in shared memory, their producer, and the writing of results.

A program owns 128 rows, 64 for each of two consumer warpgroups. A producer warp loads them once, then fills a ring of
tiles of the other side's rows by TMA; a barrier says when a tile is full, another when both consumers are through with
it. Tensors are [batch, heads, rows, D], copied by chunks of columns (chunks.py); rows and columns beyond the end load
as zeros and are not stored.

Products in flight at the end of a loop's body make ptxas serialise all of them. So every consumer waits for its own
there, and the tensor cores are kept busy by the other one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .scales import SIGMA
from .triton_compat import here, load_tile, room_for_tile_of, store_tile, where_less

HALF = gl.constexpr(64)  # rows of a consumer
STATISTICS = gl.constexpr(4)  # lse * log2(e), mu, row_a, row_delta
LSE = gl.constexpr(0)
MU = gl.constexpr(1)
ROW_A = gl.constexpr(2)
ROW_DELTA = gl.constexpr(3)


@gluon.constexpr_function
def accumulator(width):
    """The layout of what a product of a warpgroup gives: 64 rows, `width` columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def left_operand(width):
    """The layout of weights in registers whose product has `width` columns."""
    return gl.DotOperandLayout(0, accumulator(width), 2)


@gluon.jit
def given(x):
    """(x,), or () without it: partitions take no None."""
    if x is None:
        return ()
    else:
        return (x,)


@gluon.jit
def scale_of(factors, scale):
    """The softmax scale: of tensors that were rescaled, as per_tensor_scaling.py measured it."""
    if factors is None:
        return scale
    else:
        return gl.load(factors + SIGMA)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for ARRIVALS."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def of_queries(M, N, heads, group, KEYS: gl.constexpr, CAUSAL: gl.constexpr):
    """Of a program that owns queries: (batch, head, first row), and its walk over keys: (their head, how many heads are
    read from there on, first and last tile, heads of all queries)."""
    blocks = gl.cdiv(M, 2 * HALF)
    pid = gl.program_id(0)
    block = pid % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest walks first, so that the short ones fill the gaps at the end
    row0 = block * (2 * HALF)
    head = (pid // blocks) % heads
    last = gl.cdiv(N, KEYS)
    if CAUSAL:
        last = gl.minimum(last, gl.cdiv(row0 + 2 * HALF, KEYS))
    return (pid // blocks // heads, head, row0), (head // group, 1, 0, last, heads)


@gluon.jit
def whole_tiles(row, N, last, KEYS: gl.constexpr, CAUSAL: gl.constexpr):
    """How many of the first `last` tiles of keys are seen as a whole by the query `row` and those after it."""
    whole = N // KEYS
    if CAUSAL:
        whole = gl.minimum(whole, (row + 1) // KEYS)
    return gl.minimum(whole, last)


@gluon.jit
def where_seen(x, other, row, tile, N, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr):
    """x where there is a tile's key, its column, and the queries from `row` on, its rows, may see it; else `other`."""
    KEYS: gl.constexpr = x.shape[1]
    limit = N - tile * KEYS  # columns from here on are masked
    key = gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))[None, :] + here()
    if CAUSAL:
        query = row - tile * KEYS + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
        limit = gl.minimum(query + 1, limit)[:, None]
    return where_less(key, limit, x, other)


@gluon.jit
def of_keys(M, N, heads, group, ROWS: gl.constexpr, CAUSAL: gl.constexpr):
    """Of a program that owns keys: (batch, key head, first row), and its walk over the queries of all its heads."""
    blocks = gl.cdiv(N, 2 * HALF)
    kv_heads = heads // group
    pid = gl.program_id(0)
    row0 = (pid % blocks) * (2 * HALF)
    head = (pid // blocks) % kv_heads
    last = gl.cdiv(M, ROWS)
    first = 0
    if CAUSAL:
        first = gl.minimum(row0 // ROWS, last)
    return (pid // blocks // kv_heads, head, row0), (head * group, group, first, last, heads)


@gluon.jit
def tiles_for(tensors, COUNT: gl.constexpr):
    """Room for COUNT tiles of each tensor."""
    found = ()
    for i in gl.static_range(len(tensors)):
        x = tensors[i]
        found = found + (gl.allocate_shared_memory(x.dtype, [COUNT] + x.block_shape, x.layout),)
    return found


@gluon.jit
def rows_of(tile):
    """A tile [1, 1, rows, D] as [rows, D]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def own_rows(tiles, half, at):
    """A consumer's half of the own tiles. Their addresses depend on `at` (never 2^30), a counter of the loop, and so
    are made where they are used; made before the loop, they would take registers all the time."""
    rows = ()
    for i in gl.static_range(len(tiles)):
        rows = rows + (rows_of(tiles[i].index(half + (at >> 30))),)
    return rows


@gluon.jit
def held_rows(tiles, half, ROWS: gl.constexpr):
    """A consumer's half of own tiles in registers, as left operands of products that have ROWS columns."""
    rows = ()
    for i in gl.static_range(len(tiles)):
        rows = rows + (rows_of(tiles[i].index(half)).load(left_operand(ROWS)),)
    return rows


@gluon.jit
def streamed_rows(ring, stage):
    """The tiles of a stage of the ring."""
    rows = ()
    for i in gl.static_range(len(ring)):
        rows = rows + (rows_of(ring[i].index(stage)),)
    return rows


@gluon.jit
def part_of_rows(tiles, part: gl.constexpr, PARTS: gl.constexpr):
    """One of PARTS equal parts of each tile's rows."""
    if PARTS == 1:
        return tiles
    else:
        rows = ()
        for i in gl.static_range(len(tiles)):
            rows = rows + (tiles[i].slice(part * (tiles[i].shape[0] // PARTS), tiles[i].shape[0] // PARTS, 0),)
        return rows


@gluon.jit
def keep_above(passed):
    """Keeps what comes before it before what comes after it: ptxas moves arithmetic behind the next wait for products,
    where nothing overlaps it, but not over a wait for a barrier, even one that has been passed: (barrier, phase)."""
    mbarrier.wait(passed[0], passed[1])


@gluon.jit
def statistic(tile, which: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, rows] of the statistics [4, rows] of a streamed tile, to broadcast to [64, rows]."""
    return tile.slice(which, 1, 0).load(LAYOUT)


@gluon.constexpr_function
def bytes_of(tensors, CHUNKS):
    """Of a tile of each of the tensors, whose chunks lie side by side."""
    return len(tensors) // CHUNKS * sum([x.block_type.nbytes for x in tensors[:CHUNKS]])


@gluon.jit
def load_own(own, own_tiles, own_full, place, CHUNKS: gl.constexpr):
    """Copies the own rows."""
    batch, own_head, row0 = place
    WIDTH: gl.constexpr = own[0].block_shape[3]
    mbarrier.expect(own_full.index(0), 2 * bytes_of(own, CHUNKS))
    for i in gl.static_range(len(own)):
        for half in gl.static_range(2):
            rows = own_tiles[i].index(half)
            load_tile(own[i], [batch, own_head, row0 + half * HALF, i % CHUNKS * WIDTH], own_full.index(0), rows)


@gluon.jit
def produce(
    own, streamed, stats, own_tiles, ring, stats_ring, bars, place, walk, CHUNKS: gl.constexpr, STAGES: gl.constexpr
):
    """The producer: own rows, then the streamed tiles of every head that shares them, in order.

    `stats`, if it is given, are the statistics of the streamed rows, [batch * heads * 4, rows].
    """
    own_full, full, empty = bars
    batch = place[0]
    other_head, heads_shared, first, last, heads = walk
    WIDTH: gl.constexpr = streamed[0].block_shape[3]
    ROWS: gl.constexpr = streamed[0].block_shape[2]
    BYTES: gl.constexpr = bytes_of(streamed, CHUNKS) + len(stats) * STATISTICS * ROWS * 4
    load_own(own, own_tiles, own_full, place, CHUNKS)
    at = 0
    for member in range(heads_shared):
        for tile in range(first, last):
            stage = at % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(len(streamed)):
                head = other_head + member
                load_tile(streamed[i], [batch, head, tile * ROWS, i % CHUNKS * WIDTH], bar, ring[i].index(stage))
            if len(stats) > 0:
                number = batch * heads + other_head + member
                load_tile(stats[0], [number * STATISTICS, tile * ROWS], bar, stats_ring[0].index(stage))
            at += 1


@gluon.jit
def _store_rows(out, value, coordinates, tile):
    """Writes 64 rows through a tile of shared memory, which is free again afterwards."""
    rows_of(tile).store(value.to(out.dtype))
    fence_async_shared()
    store_tile(out, coordinates, tile)
    tma.store_wait(0)


@gluon.jit
def _store_in_halves(out, value, coordinates, tile):
    """Writes 64 float32 rows through a tile of 16-bit numbers: half of the columns at a time, which `out` describes."""
    batch, head, row, column = coordinates
    COLUMNS: gl.constexpr = out.block_shape[3]
    room = room_for_tile_of(out, tile)
    left, right = gl.split(value.reshape([HALF, 2, COLUMNS]).permute((0, 2, 1)))
    _store_rows(out, gl.convert_layout(left, accumulator(COLUMNS)), [batch, head, row, column], room)
    _store_rows(out, gl.convert_layout(right, accumulator(COLUMNS)), [batch, head, row, column + COLUMNS], room)


@gluon.jit
def write(
    outs, values, tiles, place, factors, who: gl.constexpr, CHUNKS: gl.constexpr, FIRST: gl.constexpr,
    STEP: gl.constexpr,
):  # fmt: skip
    """Writes a consumer's rows through own tiles, in shared memory, that nobody reads any more.

    With `factors` (per_tensor_scaling.py) the results are float32, each times its tensor's factor: number FIRST and
    so on in steps.
    """
    batch, own_head, row0 = place
    WIDTH: gl.constexpr = tiles[0].shape[4]
    for i in gl.static_range(len(outs)):
        coordinates = [batch, own_head, row0 + who * HALF, i % CHUNKS * WIDTH]
        if len(factors) == 0:
            _store_rows(outs[i], values[i], coordinates, tiles[i].index(who))
        else:
            factor = gl.load(factors[0] + (FIRST + i // CHUNKS * STEP))
            _store_in_halves(outs[i], values[i] * factor, coordinates, tiles[i].index(who))
