"""What programs stream of a block mask: the blocks that its plan lists (backends/block_plan.py), tile by tile.

A list has the blocks that are visible as a whole first, then those with a bitmap. Two loops, as in mainloop.py: tiles
of whole blocks need no mask. Of the others, tiles that no resident row sees are not streamed, and a consumer passes
over those that none of its rows sees. The producer and both consumers count iterations alike.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .blocks import CONSUMER_ROWS
from .dq_accum import store_zeros
from .mainloop import add_keys, add_queries, pass_over, stage_of
from .packed_mask import load_mask_tile
from .pipeline import load_chunks, load_resident, load_stage, rows_of_a_tile

BLOCK = gl.constexpr(128)  # queries and keys of a block
WORDS = gl.constexpr(512)  # of a bitmap
ENTRY = gl.constexpr(3)  # numbers of a listed block: which it is, which bitmap it has, which quadrants are visible
# Where the header has the place of the ends of all lists; AT_WORDS further on, that of the bitmaps.
OF_QUERIES = gl.constexpr(2)
OF_KEYS = gl.constexpr(3)
AT_WORDS = gl.constexpr(3)


class Blocks(NamedTuple):
    """A list: the blocks of keys that a block of queries sees, or those of queries that see a block of keys."""

    entries: Any
    whole: Any  # how many are visible as a whole, the first ones
    count: Any
    words: Any  # of all bitmaps, whose rows are those of resident tiles


@gluon.jit
def _list(plan, batch, head, row0, rows, OF: gl.constexpr):
    """The list of the resident block from `row0` on, of so many rows: queries or keys, as OF says."""
    entries, heads = gl.load(plan), gl.load(plan + 1)
    place = ((batch % entries) * heads + head % heads) * gl.cdiv(rows, BLOCK) + row0 // BLOCK  # mutate: place
    ends = plan + (gl.load(plan + OF) + place * 2)
    first, partial, end = gl.load(ends), gl.load(ends + 1), gl.load(ends + 2)
    words = plan + gl.load(plan + (OF + AT_WORDS))  # mutate: words
    return Blocks(plan + first, (partial - first) // ENTRY, (end - first) // ENTRY, words)


@gluon.jit
def _first_row(blocks, tile, ROWS: gl.constexpr):
    """Of a list's tile of ROWS rows."""
    block = gl.load(blocks.entries + tile * ROWS // BLOCK * ENTRY)
    return block * BLOCK + tile * ROWS % BLOCK  # mutate: return block


@gluon.jit
def _load_words(blocks, tile, consumer: gl.constexpr, COLUMNS: gl.constexpr):
    """The words of a consumer's rows of a list's tile of COLUMNS columns."""
    number = gl.load(blocks.entries + (tile * COLUMNS // BLOCK * ENTRY + 1))
    words = blocks.words + number * WORDS
    # mutate: return load_mask_tile
    return load_mask_tile((words, BLOCK, 0), consumer * CONSUMER_ROWS, tile % (BLOCK // COLUMNS), COLUMNS)


@gluon.jit
def _seen(blocks, tile, COLUMNS: gl.constexpr):
    """Whether any row sees a list's tile of COLUMNS columns, any of the first consumer, any of the second one."""
    quadrants = gl.load(blocks.entries + (tile * COLUMNS // BLOCK * ENTRY + 2))
    if COLUMNS < BLOCK:
        quadrants = (quadrants >> (tile * COLUMNS % BLOCK // (BLOCK // 2))) & 5  # mutate: quadrants
    return quadrants != 0, (quadrants & 3) != 0, (quadrants & 12) != 0  # mutate: return quadrants


@gluon.jit
def produce_listed(
    resident, streamed, stats, pipeline, block, loop, plan, rows, OF: gl.constexpr, CHUNKS: gl.constexpr,
    load_streamed: gl.constexpr = load_chunks,
):  # fmt: skip
    """`pipeline.produce` of the tiles that are listed for the resident rows, the queries or keys of which there are
    `rows`."""
    ROWS: gl.constexpr = streamed[0].block_shape[-2]
    TILES: gl.constexpr = BLOCK // ROWS
    load_resident(resident, pipeline, block, CHUNKS)
    iteration = 0
    for member in range(loop.heads):
        head = loop.head + member
        blocks = _list(plan, block.batch, head if OF == OF_KEYS else block.head, block.row0, rows, OF)
        for tile in range(blocks.count * TILES):
            row = _first_row(blocks, tile, ROWS)
            is_seen, _first, _second = _seen(blocks, tile, ROWS)
            if (tile < blocks.whole * TILES) | is_seen:
                load_stage(
                    streamed, stats, pipeline, iteration, block.batch, head, loop.query_heads, row, CHUNKS,
                    load_streamed,
                )  # fmt: skip
                iteration += 1


@gluon.jit
def stream_listed_keys(
    add_tile: gl.constexpr, accs, state, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, BIAS_LAYOUT: gl.constexpr, MASK_AHEAD: gl.constexpr = False,
):  # fmt: skip
    """`mainloop.stream_keys` over the blocks that are listed for the resident queries. The last three arguments are for
    that one."""
    block, pipeline = program.block, program.pipeline
    COLUMNS: gl.constexpr = rows_of_a_tile(pipeline.resident, pipeline.streamed)
    TILES: gl.constexpr = BLOCK // COLUMNS
    blocks = _list(program.mask[0], block.batch, block.head, block.row0, program.M, OF_QUERIES)
    for tile in range(blocks.whole * TILES):
        full = stage_of(pipeline, tile)
        accs, state = add_keys(
            add_tile, accs, state, register_operands, program, (), (), 0, 0, tile, full, consumer, CHUNKS, False, False
        )
    iteration = blocks.whole * TILES
    for tile in range(blocks.whole * TILES, blocks.count * TILES):
        is_seen, first, second = _seen(blocks, tile, COLUMNS)
        if second if consumer == 1 else first:
            full = stage_of(pipeline, iteration)
            mask = _load_words(blocks, tile, consumer, COLUMNS)
            accs, state = add_keys(
                add_tile, accs, state, register_operands, program, mask, (), 0, 0, iteration, full, consumer, CHUNKS,
                False, False,
            )  # fmt: skip
            iteration += 1
        elif is_seen:
            pass_over(pipeline, iteration)
            iteration += 1
    return accs, state


@gluon.jit
def _add_queries(
    add_tile: gl.constexpr, accs, dq, register_operands, program, masks, blocks, head, tile, iteration, before,
    consumer: gl.constexpr, CHUNKS: gl.constexpr, SUB_TILES: gl.constexpr, DQ_COLUMNS: gl.constexpr,
):  # fmt: skip
    """Adds a list's tile of queries. Returns the accumulators, and which tile it was, for d_q."""
    ROWS: gl.constexpr = program.pipeline.stats[0].shape[2]
    full = stage_of(program.pipeline, iteration)
    accs = add_queries(
        add_tile, accs, dq, register_operands, program, masks, ((),) * SUB_TILES, 0, iteration, before, full, consumer,
        CHUNKS, False,
        SUB_TILES, DQ_COLUMNS,
    )  # fmt: skip
    if len(dq) > 0:
        # Tiles beyond the last query add zeros, to the last tile.
        number = gl.minimum(_first_row(blocks, tile, ROWS) // ROWS, program.loop.end - 1)
        before = head * program.loop.end + number  # mutate: before
    return accs, before


@gluon.jit
def stream_listed_queries(
    add_tile: gl.constexpr, accs, dq, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr, SUB_TILES: gl.constexpr = 1,
    DQ_COLUMNS: gl.constexpr = 0,
):  # fmt: skip
    """`mainloop.stream_queries` over the blocks that are listed for the resident keys. CAUSAL, VARIES and BIAS_LAYOUT
    are for that one. Consumers that add to d_q pass over nothing: each needs dS of the other."""
    block, loop, pipeline = program.block, program.loop, program.pipeline
    ROWS: gl.constexpr = pipeline.stats[0].shape[2]
    TILES: gl.constexpr = BLOCK // ROWS
    iteration = 0
    before = (block.batch * loop.query_heads + loop.head) * loop.end
    if len(dq) > 0:
        store_zeros(dq, consumer)
    for member in range(loop.heads):
        head = loop.head + member
        blocks = _list(program.mask[0], block.batch, head, block.row0, program.N, OF_KEYS)
        head = block.batch * loop.query_heads + head
        for tile in range(blocks.whole * TILES):
            accs, before = _add_queries(
                add_tile, accs, dq, register_operands, program, ((),) * SUB_TILES, blocks, head, tile, iteration,
                before, consumer, CHUNKS, SUB_TILES, DQ_COLUMNS,
            )  # fmt: skip
            iteration += 1
        for tile in range(blocks.whole * TILES, blocks.count * TILES):
            is_seen, first, second = _seen(blocks, tile, ROWS)
            takes_part = is_seen if len(dq) > 0 else second if consumer == 1 else first
            if takes_part:
                masks = ()
                for i in gl.static_range(SUB_TILES):
                    masks = masks + (_load_words(blocks, tile * SUB_TILES + i, consumer, ROWS // SUB_TILES),)
                accs, before = _add_queries(
                    add_tile, accs, dq, register_operands, program, masks, blocks, head, tile, iteration, before,
                    consumer, CHUNKS, SUB_TILES, DQ_COLUMNS,
                )  # fmt: skip
                iteration += 1
            elif is_seen:
                pass_over(pipeline, iteration)
                iteration += 1
    return accs, before, iteration
