"""Persistent programs: one a multiprocessor, each with many items of work, one after the other.

A program of the other kernels loads its resident tiles, streams a few, and writes its results, and nothing overlaps
the start and the end. Here the producer runs ahead: it loads the tiles of the next item while consumers still compute
and write this one. Stages and phases of the pipeline go on from item to item; an item's part of them is its Turn.

An item is a block of two units of 64 rows of a head, one for each consumer, or a single unit: where rows end, or, with
HALVES, where the block's other unit is another program's. Single units go to the consumers by turns of heads. The other
consumer passes over their tiles, and so is soon at the next item.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .blocks import CONSUMER_ROWS, Block, Loop
from .mainloop import pass_over
from .pipeline import (
    Pipeline,
    Program,
    allocate_tiles,
    bytes_of,
    load_chunks,
    load_stage,
    make_barriers,
)
from .triton_compat import load_tile


class Items(NamedTuple):
    """The items of a program, and what all of them share."""

    first: Any  # the number of its first block of two units, among those of all heads
    count: Any
    first_unit: Any  # the units of these blocks that the program has
    end_unit: Any
    head_units: Any  # how many a head has
    heads: Any  # of resident rows, in a sequence
    streamed_heads: Any  # Loop without the head: how many an item streams, their tiles, how many a sequence has
    tiles: Any
    query_heads: Any


class Item(NamedTuple):
    """A block, what it streams, and which consumers have rows of it."""

    block: Any
    loop: Any
    takes: Any  # for each consumer


class Turn(NamedTuple):
    """An item's place in the order of a consumer's items: its tiles and phases."""

    first: Any  # the first of the two resident tiles, one for each consumer
    phase: Any  # of the barriers of those
    iteration: Any  # how many there were before


@gluon.jit
def _share(
    batches, heads, rows, streamed_heads, tiles, query_heads, HALVES: gl.constexpr,
):  # fmt: skip
    """This program's items: as many units or, without HALVES, as many blocks as the others have, but for one."""
    head_units = gl.cdiv(rows, CONSUMER_ROWS)
    head_blocks = gl.cdiv(head_units, 2)
    pid, programs = gl.program_id(0), gl.num_programs(0)
    count = batches * heads
    if HALVES:
        first_unit = count * head_units * pid // programs  # mutate: first_unit
        end_unit = count * head_units * (pid + 1) // programs
        first = _block_of(first_unit, head_units, head_blocks)
        end = _block_of(end_unit - 1, head_units, head_blocks) + 1
    else:
        first_unit = 0
        end_unit = count * head_units
        first = count * head_blocks * pid // programs
        end = count * head_blocks * (pid + 1) // programs
    return Items(first, end - first, first_unit, end_unit, head_units, heads, streamed_heads, tiles, query_heads)


@gluon.jit
def _block_of(unit, head_units, head_blocks):
    """The number of a unit's block."""
    return unit // head_units * head_blocks + unit % head_units // 2


@gluon.jit
def query_items(batches, M, N, heads, group, KEYS: gl.constexpr, HALVES: gl.constexpr):
    """The items of a program with resident queries: of one head, against tiles of KEYS keys."""
    return _share(batches, heads, M, 1, gl.cdiv(N, KEYS), heads, HALVES)


@gluon.jit
def key_items(batches, M, N, heads, group, ROWS: gl.constexpr, HALVES: gl.constexpr):
    """The items of a program with resident keys: of one key head, against tiles of ROWS queries of its heads."""
    return _share(batches, heads // group, N, group, gl.cdiv(M, ROWS), heads, HALVES)


@gluon.jit
def _item(items, i, group, OF_KEYS: gl.constexpr):
    """The program's item of this number."""
    number = items.first + i
    head_blocks = gl.cdiv(items.head_units, 2)
    row_head = number // head_blocks
    unit = row_head * items.head_units + number % head_blocks * 2
    first = gl.maximum(unit, items.first_unit)
    end = gl.minimum(gl.minimum(unit + 2, (row_head + 1) * items.head_units), items.end_unit)
    is_block = end - first == 2
    second = row_head % 2  # the consumer that takes a single unit
    # A single unit of the second consumer: the block begins at the unit before.
    before = second * (2 - (end - first))  # mutate: before
    head = row_head % items.heads
    block = Block(row_head // items.heads, head, (first - row_head * items.head_units - before) * CONSUMER_ROWS)
    streamed = head * group if OF_KEYS else head // group  # mutate: streamed
    loop = Loop(streamed, items.streamed_heads, 0, items.tiles, items.query_heads)
    return Item(block, loop, (is_block | (second == 0), is_block | (second == 1)))


@gluon.jit
def _turn(BUFFERS: gl.constexpr, begun, iteration):
    """The turn of a consumer's item, of which it has begun so many before."""
    return Turn(begun % BUFFERS * 2, (begun // BUFFERS) & 1, iteration)  # mutate: return Turn


@gluon.jit
def allocate_persistent(
    resident, streamed, stats, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    allocate_streamed: gl.constexpr = allocate_tiles,
):  # fmt: skip
    """The pipeline, with BUFFERS resident tiles of each tensor for each consumer, and the barriers that say that these
    are free again."""
    tiles = allocate_tiles(resident, 2 * BUFFERS), allocate_streamed(streamed, STAGES), allocate_tiles(stats, STAGES)
    barriers = make_barriers(2 * BUFFERS, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    pipeline = Pipeline(tiles[0], tiles[1], tiles[2], barriers[0], barriers[1], barriers[2], ())
    return pipeline, make_barriers(2 * BUFFERS, 1)


@gluon.jit
def _load_resident(resident, pipeline, free, block, begun, consumer: gl.constexpr, CHUNKS: gl.constexpr):
    """Starts the copies of a consumer's resident tiles, once those of an earlier item are written."""
    WIDTH: gl.constexpr = resident[0].block_shape[3]
    BUFFERS: gl.constexpr = free.shape[0] // 2
    turn = _turn(BUFFERS, begun, 0)
    number = turn.first + consumer
    mbarrier.wait(free.index(number), turn.phase ^ 1)  # mutate: mbarrier.wait
    bar = pipeline.resident_full.index(number)
    mbarrier.expect(bar, bytes_of(pipeline.resident, resident))
    for i in gl.static_range(len(resident)):
        coordinates = [block.batch, block.head, block.row0 + consumer * CONSUMER_ROWS, i % CHUNKS * WIDTH]
        load_tile(resident[i], coordinates, bar, pipeline.resident[i].index(number))


@gluon.jit
def produce_items(
    resident, streamed, stats, pipeline, free, items, group, OF_KEYS: gl.constexpr, CHUNKS: gl.constexpr,
    load_streamed: gl.constexpr = load_chunks,
):  # fmt: skip
    """The producer: of each item the first streamed tile, which needs no item to be written, the resident tiles, and
    the other streamed tiles."""
    ROWS: gl.constexpr = streamed[0].block_shape[2]
    iteration = 0
    begun0 = 0
    begun1 = 0
    for i in range(items.count):
        item = _item(items, i, group, OF_KEYS)
        block, loop = item.block, item.loop
        for member in range(loop.heads):
            for tile in range(loop.first, loop.end):
                load_stage(
                    streamed, stats, pipeline, iteration, block.batch, loop.head + member, loop.query_heads,
                    tile * ROWS, CHUNKS, load_streamed,
                )  # fmt: skip
                iteration += 1
                if member + tile == 0:
                    if item.takes[0]:
                        _load_resident(resident, pipeline, free, block, begun0, 0, CHUNKS)
                        begun0 += 1
                    if item.takes[1]:
                        _load_resident(resident, pipeline, free, block, begun1, 1, CHUNKS)
                        begun1 += 1


@gluon.jit
def consume_items(
    consume: gl.constexpr, program, rest, free, items, group, consumer: gl.constexpr, OF_KEYS: gl.constexpr,
    REGISTER_OPERANDS: gl.constexpr,
):  # fmt: skip
    """A consumer: `consume`, which a kernel gives, of each item with rows of it."""
    tiles = program.pipeline
    BUFFERS: gl.constexpr = free.shape[0] // 2
    iteration = 0
    begun = 0
    for i in range(items.count):
        item = _item(items, i, group, OF_KEYS)
        steps = item.loop.heads * item.loop.end
        if item.takes[consumer]:
            turn = _turn(BUFFERS, begun, iteration)
            pipeline = Pipeline(
                tiles.resident, tiles.streamed, tiles.stats, tiles.resident_full, tiles.full, tiles.empty, (turn,)
            )
            consume(
                Program(
                    program.outs, pipeline, (), (), (), item.block, item.loop, program.scale, program.M, program.N
                ),
                rest, consumer, REGISTER_OPERANDS,
            )  # fmt: skip
            mbarrier.arrive(free.index(turn.first + consumer), count=1)
            begun += 1
        else:
            for step in range(steps):
                pass_over(tiles, iteration + step)
        iteration += steps  # mutate: iteration
