"""The mainloops of the consumers: they take the tiles that the producer streams and hand each to a kernel's `add_tile`.

Phases, stages, masks and the order of the tiles are here; what a tile adds to the accumulators is in the kernels.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .bias import bias_by_key, bias_of_head, load_bias_by_query
from .blocks import CONSUMER_ROWS, unmasked_tiles
from .chunks import by_tensor, zeros
from .dq_accum import store_zeros
from .packed_mask import load_mask_tile, packed_by_query
from .pipeline import (
    await_resident,
    barrier_of,
    load_register_operands,
    resident_number,
    resident_rows,
    rows_of_a_tile,
    streamed_rows,
    sub_tile_rows,
)


class Inputs(NamedTuple):
    """What `add_tile` reads. Of each tensor the column chunks are a tuple."""

    resident: Any
    streamed: Any
    stats: Any  # [4, streamed rows], of the backward with resident keys
    mask: Any  # (words of the packed mask,), or ()
    bias: Any  # the tile of the additive mask (bias.py), or ()
    passed: Any  # (barrier, phase) of the tile, for `keep_above`


class Position(NamedTuple):
    """Which tile of queries `add_tile` gets: a whole one, or one of its SUB_TILES pieces."""

    tile: Any  # its number within the head
    iteration: Any
    before: Any  # the tile of the iteration before, among those of all heads
    SUB_TILE: Any
    SUB_TILES: Any


@gluon.jit
def begin(
    program, consumer, like, REGISTER_OPERANDS: gl.constexpr = 0, CHUNKS: gl.constexpr = 1, COLUMNS: gl.constexpr = 0
):
    """Accumulators of zeros, as wide as the tiles `like`, and, once the resident tiles are there, the first
    REGISTER_OPERANDS tensors of them in registers: left operands of products with COLUMNS columns."""
    pipeline = program.pipeline
    accs = zeros(like)
    await_resident(pipeline, consumer)
    tiles = pipeline.resident[: REGISTER_OPERANDS * CHUNKS]
    return accs, load_register_operands(tiles, resident_number(pipeline, consumer), COLUMNS)


@gluon.jit
def _resident(pipeline, register_operands, consumer, iteration, CHUNKS: gl.constexpr):
    """The resident tiles by tensor, the first of them in registers."""
    number = resident_number(pipeline, consumer)
    in_memory = resident_rows(pipeline.resident[len(register_operands) :], number, iteration)
    return by_tensor(register_operands + in_memory, CHUNKS)


@gluon.jit
def stage_of(pipeline, iteration):
    """The stage of an iteration, and what `barrier_of` gives of it: whether it is full."""
    if len(pipeline.turn) > 0:
        iteration += pipeline.turn[0].iteration  # mutate: iteration
    return iteration % pipeline.full.shape[0], barrier_of(pipeline.full, iteration)


@gluon.jit
def pass_over(pipeline, iteration):
    """An iteration of which a consumer's rows see nothing: awaits the tile, and frees its stage."""
    stage, passed = stage_of(pipeline, iteration)
    bar, phase = passed
    mbarrier.wait(bar, phase)
    mbarrier.arrive(pipeline.empty.index(stage), count=1)


@gluon.jit
def add_keys(
    add_tile: gl.constexpr, accs, state, register_operands, program, mask, bias, row, tile, iteration, full,
    consumer: gl.constexpr, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One iteration of resident queries: awaits its keys, adds them, and frees their stage. `full`
    comes from `stage_of`."""
    pipeline = program.pipeline
    stage, passed = full
    bar, phase = passed
    mbarrier.wait(bar, phase)
    resident = _resident(pipeline, register_operands, consumer, iteration, CHUNKS)
    streamed = by_tensor(streamed_rows(pipeline.streamed, stage), CHUNKS)
    inputs = Inputs(resident, streamed, (), mask, bias, passed)
    accs, state = add_tile(by_tensor(accs, CHUNKS), state, inputs, program, row, tile, CAUSAL, MASKED)
    mbarrier.arrive(pipeline.empty.index(stage), count=1)
    return accs, state


@gluon.jit
def add_queries(
    add_tile: gl.constexpr, accs, dq, register_operands, program, masks, biases, tile, iteration, before, full,
    consumer: gl.constexpr, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr, SUB_TILES: gl.constexpr,
    DQ_COLUMNS: gl.constexpr,
):  # fmt: skip
    """One iteration of resident keys: awaits its queries, adds them piece by piece, and frees their stage."""
    pipeline = program.pipeline
    ROWS: gl.constexpr = pipeline.stats[0].shape[2] // SUB_TILES
    stage, passed = full
    bar, phase = passed
    mbarrier.wait(bar, phase)
    resident = _resident(pipeline, register_operands, consumer, iteration, CHUNKS)
    for i in gl.static_range(SUB_TILES):
        streamed = by_tensor(sub_tile_rows(streamed_rows(pipeline.streamed, stage), i, SUB_TILES), CHUNKS)
        stats = pipeline.stats[0].index(stage).slice(i * ROWS, ROWS, 1)
        inputs = Inputs(resident, streamed, stats, masks[i], biases[i], passed)
        accs = add_tile(
            by_tensor(accs, CHUNKS), dq, inputs, program,
            # in place: an assignment would make tensors of its constants
            Position(tile * SUB_TILES + i, iteration, before, i, SUB_TILES), consumer, CAUSAL, DQ_COLUMNS,
        )  # fmt: skip
    mbarrier.arrive(pipeline.empty.index(stage), count=1)
    return accs


@gluon.jit
def _stream_keys(
    add_tile: gl.constexpr, accs, state, register_operands, program, first, end, consumer: gl.constexpr,
    CHUNKS: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr, MASK_AHEAD: gl.constexpr,
    BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """`stream_keys` for the tiles from `first` until before `end`, MASKED by position or not."""
    packed_mask = program.mask
    KEYS: gl.constexpr = rows_of_a_tile(program.pipeline.resident, program.pipeline.streamed)
    row = program.block.row0 + consumer * CONSUMER_ROWS
    next_mask = load_mask_tile(packed_mask, row, gl.minimum(first, end - 1), KEYS) if MASK_AHEAD else ()
    for tile in range(first, end):
        full = stage_of(program.pipeline, tile)
        if MASK_AHEAD:
            mask = next_mask
            next_mask = load_mask_tile(packed_mask, row, gl.minimum(tile + 1, end - 1), KEYS)  # mutate: next_mask
        else:
            mask = load_mask_tile(packed_mask, row, tile, KEYS)
        bias = bias_by_key(program.bias, row, tile, program.M, program.N, KEYS, BIAS_LAYOUT, MASKED)
        accs, state = add_keys(
            add_tile, accs, state, register_operands, program, mask, bias, row, tile, tile, full, consumer, CHUNKS,
            CAUSAL, MASKED,
        )  # fmt: skip
    return accs, state


@gluon.jit
def stream_keys(
    add_tile: gl.constexpr, accs, state, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, BIAS_LAYOUT: gl.constexpr, MASK_AHEAD: gl.constexpr = False,
):  # fmt: skip
    """The mainloop of resident queries, over the tiles of keys. `state` has numbers of each query.

    Two loops: a condition in a common one would become a selection for each score. With MASK_AHEAD the packed mask is
    loaded a tile ahead, if there are registers for it.
    """
    KEYS: gl.constexpr = rows_of_a_tile(program.pipeline.resident, program.pipeline.streamed)
    end = program.loop.end
    unmasked = unmasked_tiles(program.block.row0 + consumer * CONSUMER_ROWS, program.N, end, KEYS, CAUSAL)
    accs, state = _stream_keys(
        add_tile, accs, state, register_operands, program, 0, unmasked, consumer, CHUNKS, CAUSAL, False, MASK_AHEAD,
        BIAS_LAYOUT,
    )  # fmt: skip
    return _stream_keys(
        add_tile, accs, state, register_operands, program, unmasked, end, consumer, CHUNKS, CAUSAL, True, MASK_AHEAD,
        BIAS_LAYOUT,
    )  # fmt: skip


@gluon.jit
def stream_queries(
    add_tile: gl.constexpr, accs, dq, register_operands, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    CAUSAL: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr, SUB_TILES: gl.constexpr = 1,
    DQ_COLUMNS: gl.constexpr = 0,
):  # fmt: skip
    """The mainloop of resident keys, over the tiles of queries of all heads of the group, each in SUB_TILES pieces.

    `dq` and DQ_COLUMNS are for `add_tile` (dq_accum.py). Returns the accumulators, the last tile (among those of all
    heads) and the number of iterations.
    """
    block, loop = program.block, program.loop
    ROWS: gl.constexpr = program.pipeline.stats[0].shape[2] // SUB_TILES
    iteration = 0
    before = (block.batch * loop.query_heads + loop.head) * loop.end + loop.first
    if len(dq) > 0:
        store_zeros(dq, consumer)
    for member in range(loop.heads):
        head = loop.head + member
        packed_mask = packed_by_query(program.mask, block.batch, head, loop.query_heads, program.M, program.N, VARIES)
        for tile in range(loop.first, loop.end):
            full = stage_of(program.pipeline, iteration)
            bias = bias_of_head(program.bias, block.batch, head)
            masks, biases = (), ()
            for i in gl.static_range(SUB_TILES):
                row = block.row0 + consumer * CONSUMER_ROWS
                masks = masks + (load_mask_tile(packed_mask, row, tile * SUB_TILES + i, ROWS, True),)
                biases = biases + (
                    load_bias_by_query(
                        bias, block.batch * loop.query_heads + head, row, tile * SUB_TILES + i, program.M, program.N,
                        ROWS, BIAS_LAYOUT,
                    ),
                )  # fmt: skip
            accs = add_queries(
                add_tile, accs, dq, register_operands, program, masks, biases, tile, iteration, before, full, consumer,
                CHUNKS, CAUSAL, SUB_TILES, DQ_COLUMNS,
            )  # fmt: skip
            if len(dq) > 0:
                # mutate: before
                before = (block.batch * loop.query_heads + loop.head + member) * loop.end + tile
            iteration += 1
    return accs, before, iteration
