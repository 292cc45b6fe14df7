"""What programs stream of a block mask: the blocks that its plan lists (backends/block_plan.py), tile by tile.

A list has blocks that are visible as a whole first, then those with a bitmap. Two loops, as in mainloop.py: the tiles
of whole blocks need no mask. The producer walks the same list.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .blocks import CONSUMER_ROWS
from .dq_accum import store_zeros
from .mainloop import add_keys, add_queries, stage_of
from .packed_mask import load_mask_tile
from .pipeline import load_chunks, load_resident, load_stage

BLOCK = gl.constexpr(128)  # queries and keys of a block
WORDS = gl.constexpr(512)  # of a bitmap
# Where the plan's header says where a section begins: the ends of lists, and after AT_WORDS more the words.
OF_QUERIES = gl.constexpr(2)
OF_KEYS = gl.constexpr(3)
AT_WORDS = gl.constexpr(3)


class Blocks(NamedTuple):
    """A list: the blocks of keys that a block of queries sees, or those of queries that see a block of keys."""

    entries: Any  # of each two numbers: which block, and which bitmap
    whole: Any  # how many are visible as a whole, the first ones
    count: Any
    words: Any  # of all bitmaps, for tiles whose rows are the resident ones


@gluon.jit
def _list(plan, batch, head, row0, rows, OF: gl.constexpr):
    """The list of the block from `row0` on of so many queries or keys, whichever OF says."""
    entries, heads = gl.load(plan), gl.load(plan + 1)
    place = ((batch % entries) * heads + head % heads) * gl.cdiv(rows, BLOCK) + row0 // BLOCK  # mutate: place
    ends = plan + (gl.load(plan + OF) + place * 2)
    first, partial, end = gl.load(ends), gl.load(ends + 1), gl.load(ends + 2)
    words = plan + gl.load(plan + (OF + AT_WORDS))
    return Blocks(plan + first, (partial - first) // 2, (end - first) // 2, words)


@gluon.jit
def _first_row(blocks, tile, ROWS: gl.constexpr):
    """Of a list's tile of ROWS rows, counted from the first one on."""
    return gl.load(blocks.entries + tile * ROWS // BLOCK * 2) * BLOCK + tile * ROWS % BLOCK  # mutate: return gl load


@gluon.jit
def _load_words(blocks, tile, consumer: gl.constexpr, COLUMNS: gl.constexpr):
    """The words of a consumer's 64 rows of a list's tile of COLUMNS columns."""
    number = gl.load(blocks.entries + (tile * COLUMNS // BLOCK * 2 + 1))
    in_block = tile % (BLOCK // COLUMNS)
    return load_mask_tile((blocks.words + number * WORDS, BLOCK, 0), consumer * CONSUMER_ROWS, in_block, COLUMNS)


@gluon.jit
def produce_listed(
    resident, streamed, stats, pipeline, block, loop, plan, rows, OF: gl.constexpr, CHUNKS: gl.constexpr,
    load_streamed: gl.constexpr = load_chunks,
):  # fmt: skip
    """`pipeline.produce` of the tiles that are listed for the resident rows, the queries or keys of which there are
    `rows`."""
    ROWS: gl.constexpr = streamed[0].block_shape[2]
    load_resident(resident, pipeline, block, CHUNKS)
    iteration = 0
    for member in range(loop.heads):
        head = loop.head + member
        blocks = _list(plan, block.batch, head if OF == OF_KEYS else block.head, block.row0, rows, OF)
        for tile in range(blocks.count * (BLOCK // ROWS)):
            row = _first_row(blocks, tile, ROWS)
            load_stage(
                streamed, stats, pipeline, iteration, block.batch, head, loop.query_heads, row, CHUNKS, load_streamed
            )
            iteration += 1


@gluon.jit
def _stream_keys(
    add_tile: gl.constexpr, accs, state, register_operands, program, blocks, first, end, consumer: gl.constexpr,
    CHUNKS: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """`stream_listed_keys` for the tiles from `first` until before `end`, with bitmaps or without."""
    COLUMNS: gl.constexpr = program.pipeline.streamed[0].shape[3]
    for tile in range(first, end):
        full = stage_of(program.pipeline, tile)
        mask = _load_words(blocks, tile, consumer, COLUMNS) if PARTIAL else ()
        accs, state = add_keys(
            add_tile, accs, state, register_operands, program, mask, 0, 0, tile, full, consumer, CHUNKS, False, False
        )
    return accs, state


@gluon.jit
def stream_listed_keys(
    add_tile: gl.constexpr, accs, state, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr = False, MASK_AHEAD: gl.constexpr = False,
):  # fmt: skip
    """`mainloop.stream_keys` over the blocks that are listed for the resident queries. The last two arguments are for
    that one."""
    block = program.block
    TILES: gl.constexpr = BLOCK // program.pipeline.streamed[0].shape[3]
    blocks = _list(program.mask[0], block.batch, block.head, block.row0, program.M, OF_QUERIES)
    whole, end = blocks.whole * TILES, blocks.count * TILES
    accs, state = _stream_keys(
        add_tile, accs, state, register_operands, program, blocks, 0, whole, consumer, CHUNKS, False
    )
    return _stream_keys(
        add_tile, accs, state, register_operands, program, blocks, whole, end, consumer, CHUNKS, True
    )


@gluon.jit
def _stream_queries(
    add_tile: gl.constexpr, accs, dq, register_operands, program, blocks, head, first, end, iteration, before,
    consumer: gl.constexpr, CHUNKS: gl.constexpr, SUB_TILES: gl.constexpr, DQ_COLUMNS: gl.constexpr,
    PARTIAL: gl.constexpr,
):  # fmt: skip
    """`stream_listed_queries` for the tiles of one head from `first` until before `end`, with bitmaps or without."""
    ROWS: gl.constexpr = program.pipeline.stats[0].shape[2]
    for tile in range(first, end):
        full = stage_of(program.pipeline, iteration)
        masks = ()
        for i in gl.static_range(SUB_TILES):
            if PARTIAL:
                masks = masks + (_load_words(blocks, tile * SUB_TILES + i, consumer, ROWS // SUB_TILES),)
            else:
                masks = masks + ((),)
        accs = add_queries(
            add_tile, accs, dq, register_operands, program, masks, 0, iteration, before, full, consumer, CHUNKS,
            False, SUB_TILES, DQ_COLUMNS,
        )  # fmt: skip
        if len(dq) > 0:
            # Tiles beyond the last query add zeros, wherever.
            number = gl.minimum(_first_row(blocks, tile, ROWS) // ROWS, program.loop.end - 1)
            before = head * program.loop.end + number  # mutate: before
        iteration += 1
    return accs, iteration, before


@gluon.jit
def stream_listed_queries(
    add_tile: gl.constexpr, accs, dq, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, VARIES: gl.constexpr, SUB_TILES: gl.constexpr = 1, DQ_COLUMNS: gl.constexpr = 0,
):  # fmt: skip
    """`mainloop.stream_queries` over the blocks that are listed for the resident keys. CAUSAL and VARIES are for that
    one."""
    block, loop = program.block, program.loop
    TILES: gl.constexpr = BLOCK // program.pipeline.stats[0].shape[2]
    iteration = 0
    before = (block.batch * loop.query_heads + loop.head) * loop.end
    if len(dq) > 0:
        store_zeros(dq, consumer)
    for member in range(loop.heads):
        head = loop.head + member
        blocks = _list(program.mask[0], block.batch, head, block.row0, program.N, OF_KEYS)
        whole, end = blocks.whole * TILES, blocks.count * TILES
        head = block.batch * loop.query_heads + head
        accs, iteration, before = _stream_queries(
            add_tile, accs, dq, register_operands, program, blocks, head, 0, whole, iteration, before, consumer, CHUNKS,
            SUB_TILES, DQ_COLUMNS, False,
        )  # fmt: skip
        accs, iteration, before = _stream_queries(
            add_tile, accs, dq, register_operands, program, blocks, head, whole, end, iteration, before, consumer,
            CHUNKS, SUB_TILES, DQ_COLUMNS, True,
        )  # fmt: skip
    return accs, before, iteration
