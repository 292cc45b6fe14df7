"""What programs stream of a window or a packed sequence: the tiles within a band of differences (band_place.py).

Tiles that all resident rows of a program see as a whole come first, then those at both ends of the band. Two loops, as
in mainloop.py: the first ones need no mask. In the others a consumer passes over tiles that none of its rows sees. The
producer and both consumers count iterations alike.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .band_place import BLOCK_ROWS
from .blocks import CONSUMER_ROWS
from .dq_accum import store_zeros
from .mainloop import add_keys, add_queries, pass_over, stage_of
from .packed_mask import along, bit_layout
from .pipeline import STATISTICS, barrier_of, bytes_of, load_chunks, load_resident, rows_of_a_tile
from .triton_compat import load_tile


class Tiles(NamedTuple):
    """The tiles of a band that a program streams: numbers from the band's first row on."""

    first: Any
    first_whole: Any
    whole: Any  # how many all resident rows see as a whole
    count: Any


@gluon.jit
def tiles_of(band, row0, ROWS: gl.constexpr, RESIDENT: gl.constexpr = BLOCK_ROWS):
    """The tiles of ROWS rows that the RESIDENT resident rows from `row0` on see."""
    begin = gl.maximum(row0 + band.low - band.first, 0)
    end = gl.minimum(row0 + RESIDENT + band.high, band.end) - band.first  # mutate: end
    whole_begin = gl.maximum(row0 + (RESIDENT - 1) + band.low - band.first, 0)  # mutate: whole_begin
    whole_end = gl.minimum(row0 + 1 + band.high, band.end) - band.first  # mutate: whole_end
    first = begin // ROWS
    first_whole = gl.cdiv(whole_begin, ROWS)
    whole = gl.maximum(whole_end, 0) // ROWS - first_whole
    count = gl.maximum(gl.cdiv(gl.maximum(end, 0), ROWS) - first, 0)
    return Tiles(first, first_whole, gl.maximum(whole, 0), count)


@gluon.jit
def _before(tiles):
    """How many tiles come before the whole ones."""
    return gl.minimum(tiles.first_whole - tiles.first, tiles.count - tiles.whole)


@gluon.jit
def end_of(tiles, side):
    """The iterations of one end of the band, before or behind the whole tiles, and what added to one gives its tile.

    Computed, not kept from one turn of a loop to the next: Triton 3.6 takes a number that is given another one's of the
    turn before for one that never changes.
    """
    middle = tiles.whole + _before(tiles)
    first = tiles.whole + side * (middle - tiles.whole)  # mutate: first
    end = middle + side * (tiles.count - middle)
    return first, end, tiles.first - (1 - side) * tiles.whole


@gluon.jit
def _below(count, quarter):
    """The bits of a quarter's columns (packed_mask.py) among the first `count` ones."""
    bits = (count >> 3) * 2 + gl.minimum(gl.maximum((count & 7) - 2 * quarter, 0), 2)  # mutate: bits
    return gl.where(bits < 32, (1 << (bits & 31)) - 1, -1)


class Seen(NamedTuple):
    """What the 64 resident rows of a consumer see, counted from the band's first row on: row i those from low + i on
    until before high + i, of which there are `end`."""

    low: Any
    high: Any
    end: Any


@gluon.jit
def seen_by(band, row0):
    """`Seen` of the resident rows from `row0` on."""
    return Seen(row0 + band.low - band.first, row0 + band.high + 1 - band.first, band.end - band.first)


@gluon.jit
def visible(seen, rows, tile, COLUMNS: gl.constexpr):
    """The words of a packed mask for a consumer's rows and a tile. Of the 64 rows only the first `rows` ones see
    anything."""
    WORDS: gl.constexpr = along(bit_layout(COLUMNS // 8), (0, 2))
    # The numbers of rows depend on the tile (never 2^30): made before the loop, they would take registers all the time.
    row = (tile >> 30) + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, WORDS))
    quarter = gl.arange(0, 4, gl.SliceLayout(0, WORDS))[None, :]
    first = tile * COLUMNS
    low = gl.minimum(gl.maximum(row + (seen.low - first), 0), COLUMNS)  # mutate: low
    high = gl.minimum(gl.maximum(gl.minimum(row + (seen.high - first), seen.end - first), 0), COLUMNS)  # mutate: high
    high = gl.where(row < rows, high, 0)  # mutate: high (2)
    return (_below(high[:, None], quarter) & ~_below(low[:, None], quarter),)


@gluon.jit
def _is_seen(seen, tile, COLUMNS: gl.constexpr):
    """Whether any of a consumer's rows sees a tile."""
    first = tile * COLUMNS
    return (first < seen.high + (CONSUMER_ROWS - 1)) & (first + COLUMNS > seen.low)  # mutate: return first


@gluon.jit
def _load_stage(
    streamed, stats, pipeline, iteration, band, head, tile, CHUNKS: gl.constexpr, load_streamed: gl.constexpr
):
    """`pipeline.load_stage`, with statistics whose columns are others than the rows."""
    ROWS: gl.constexpr = streamed[0].block_shape[-2]
    BYTES: gl.constexpr = bytes_of(pipeline.streamed, streamed) + len(stats) * STATISTICS * ROWS * 4
    STAGES: gl.constexpr = pipeline.full.shape[0]
    stage = iteration % STAGES
    bar = pipeline.full.index(stage)
    empty, phase = barrier_of(pipeline.empty, iteration)
    mbarrier.wait(empty, phase ^ 1)
    mbarrier.expect(bar, BYTES)
    row = band.first + tile * ROWS
    load_streamed(streamed, pipeline.streamed, stage, bar, band.entry, head, row, CHUNKS)
    if len(stats) > 0:
        coordinates = [(band.number + head) * STATISTICS, band.column + tile * ROWS]  # mutate: coordinates
        load_tile(stats[0], coordinates, bar, pipeline.stats[0].index(stage))


@gluon.jit
def produce_band(
    resident, streamed, stats, pipeline, block, loop, band, CHUNKS: gl.constexpr,
    load_streamed: gl.constexpr = load_chunks,
):  # fmt: skip
    """`pipeline.produce` of the tiles that the resident rows see."""
    ROWS: gl.constexpr = streamed[0].block_shape[-2]
    RESIDENT: gl.constexpr = pipeline.resident[0].shape[0] * CONSUMER_ROWS
    load_resident(resident, pipeline, block, CHUNKS)
    tiles = tiles_of(band, block.row0, ROWS, RESIDENT)
    iteration = 0
    for member in range(loop.heads):
        head = loop.head + member
        for i in range(tiles.count):
            tile = tiles.first_whole + i
            if i >= tiles.whole + _before(tiles):
                tile = tiles.first + i
            elif i >= tiles.whole:
                tile = tiles.first + (i - tiles.whole)
            _load_stage(streamed, stats, pipeline, iteration, band, head, tile, CHUNKS, load_streamed)
            iteration += 1


@gluon.jit
def stream_band_keys(
    add_tile: gl.constexpr, accs, state, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, BIAS_LAYOUT: gl.constexpr, MASK_AHEAD: gl.constexpr = False,
):  # fmt: skip
    """`mainloop.stream_keys` over the tiles that the resident queries see. The last three arguments are for that
    one."""
    pipeline, band = program.pipeline, program.mask[0]
    COLUMNS: gl.constexpr = rows_of_a_tile(pipeline.resident, pipeline.streamed)
    tiles = tiles_of(band, program.block.row0, COLUMNS)
    seen = seen_by(band, program.block.row0 + consumer * CONSUMER_ROWS)
    for iteration in range(tiles.whole):
        full = stage_of(pipeline, iteration)
        accs, state = add_keys(
            add_tile, accs, state, register_operands, program, (), (), 0, 0, iteration, full, consumer, CHUNKS, False,
            False,
        )  # fmt: skip
    for side in range(2):  # both ends: in the innermost loop fewer numbers are alive than where it goes over both
        first, end, shift = end_of(tiles, side)
        for iteration in range(first, end):
            tile = iteration + shift
            if _is_seen(seen, tile, COLUMNS):
                full = stage_of(pipeline, iteration)
                mask = visible(seen, CONSUMER_ROWS, tile, COLUMNS)
                accs, state = add_keys(
                    add_tile, accs, state, register_operands, program, mask, (), 0, 0, iteration, full, consumer,
                    CHUNKS, False, False,
                )  # fmt: skip
            else:
                pass_over(pipeline, iteration)
    return accs, state


@gluon.jit
def stream_band_queries(
    add_tile: gl.constexpr, accs, dq, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr, SUB_TILES: gl.constexpr = 1,
    DQ_COLUMNS: gl.constexpr = 0,
):  # fmt: skip
    """`mainloop.stream_queries` over the tiles that the resident keys see. CAUSAL, VARIES and BIAS_LAYOUT are for that
    one. Consumers that add to d_q pass over nothing: each needs dS of the other."""
    block, loop, pipeline, band = program.block, program.loop, program.pipeline, program.mask[0]
    ROWS: gl.constexpr = pipeline.stats[0].shape[2]
    SUB_ROWS: gl.constexpr = ROWS // SUB_TILES
    tiles = tiles_of(band, block.row0, ROWS)
    row0 = block.row0 + consumer * CONSUMER_ROWS
    seen = seen_by(band, row0)
    iteration = 0
    before = (block.batch * loop.query_heads + loop.head) * loop.end
    if len(dq) > 0:
        store_zeros(dq, consumer)
    for member in range(loop.heads):
        head = block.batch * loop.query_heads + loop.head + member
        for i in range(tiles.whole):
            full = stage_of(pipeline, iteration)
            accs = add_queries(
                add_tile, accs, dq, register_operands, program, ((),) * SUB_TILES, ((),) * SUB_TILES, 0, iteration,
                before, full, consumer, CHUNKS, False, SUB_TILES, DQ_COLUMNS,
            )  # fmt: skip
            if len(dq) > 0:
                before = head * loop.end + tiles.first_whole + i  # mutate: before
            iteration += 1
        for side in range(2):
            first, end, shift = end_of(tiles, side)
            for i in range(first, end):
                tile = i + shift
                takes_part = True if len(dq) > 0 else _is_seen(seen, tile, ROWS)
                if takes_part:
                    full = stage_of(pipeline, iteration)
                    masks = ()
                    for j in gl.static_range(SUB_TILES):
                        masks = masks + (visible(seen, program.N - row0, tile * SUB_TILES + j, SUB_ROWS),)
                    accs = add_queries(
                        add_tile, accs, dq, register_operands, program, masks, ((),) * SUB_TILES, 0, iteration,
                        before, full, consumer, CHUNKS, False, SUB_TILES, DQ_COLUMNS,
                    )  # fmt: skip
                    if len(dq) > 0:
                        before = head * loop.end + tile
                else:
                    pass_over(pipeline, iteration)
                iteration += 1
    return accs, before, iteration
