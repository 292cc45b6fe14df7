"""Writes the results of a consumer to global memory, through resident tiles that nobody reads any more."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from .blocks import CONSUMER_ROWS
from .pipeline import ENTRIES, accumulator, as_matrix, resident_number
from .triton_compat import reinterpret_tile, store_tile


@gluon.jit
def _store_rows(out, value, coordinates, tile):
    """Writes 64 rows through a tile of shared memory, which is free again afterwards."""
    _start_store(out, value, coordinates, tile)
    tma.store_wait(0)


@gluon.jit
def _start_store(out, value, coordinates, tile):
    """Begins to write 64 rows through a tile of shared memory."""
    as_matrix(tile).store(value.to(out.dtype))
    fence_async_shared()
    if len(out.block_shape) == 4:
        store_tile(out, coordinates, tile)
    else:
        batch, head, row, column = coordinates
        store_tile(out, [ENTRIES, batch, head, row, column], tile)


@gluon.jit
def _store_in_halves(out, value, coordinates, tile):
    """Writes 64 float32 rows through a tile of 16-bit numbers: half of the columns at a time, which `out` describes."""
    batch, head, row, column = coordinates
    COLUMNS: gl.constexpr = out.block_shape[-1]
    tile = reinterpret_tile(out, tile)
    left, right = gl.split(value.reshape([CONSUMER_ROWS, 2, COLUMNS]).permute((0, 2, 1)))
    _store_rows(out, gl.convert_layout(left, accumulator(COLUMNS)), [batch, head, row, column], tile)
    # mutate: _store_rows
    _store_rows(out, gl.convert_layout(right, accumulator(COLUMNS)), [batch, head, row, column + COLUMNS], tile)


@gluon.jit
def _as_wide(out, tile):
    """The tile, which has as many columns as the result, or more; then its first bytes as one that has as many."""
    if tile.shape[3] == out.block_shape[-1]:
        return tile
    else:
        return reinterpret_tile(out, tile)


@gluon.jit
def store_results(
    program, values, consumer: gl.constexpr, CHUNKS: gl.constexpr, FIRST: gl.constexpr, STEP: gl.constexpr
):
    """Writes a consumer's 64 rows of each result.

    With per-tensor scaling (per_tensor_scaling.py) results are multiplied by their scales: the first by number FIRST,
    the next by number FIRST + STEP, and so on. They are float32, or gradients of another half type than that of tiles.
    """
    outs, tiles, block, tensor_scales = program.outs, program.pipeline.resident, program.block, program.tensor_scales
    WIDTH: gl.constexpr = tiles[0].shape[4]
    number = resident_number(program.pipeline, consumer)
    for i in gl.static_range(len(outs)):
        # mutate: coordinates
        coordinates = [block.batch, block.head, block.row0 + consumer * CONSUMER_ROWS, i % CHUNKS * WIDTH]
        if len(program.pipeline.turn) > 0:
            _start_store(outs[i], values[i], coordinates, _as_wide(outs[i], tiles[i].index(number)))
        elif len(tensor_scales) == 0:
            _store_rows(outs[i], values[i], coordinates, _as_wide(outs[i], tiles[i].index(number)))
        else:
            scale = gl.load(tensor_scales[0] + (FIRST + i // CHUNKS * STEP))  # mutate: scale
            if outs[i].dtype == gl.float32:
                _store_in_halves(outs[i], values[i] * scale, coordinates, tiles[i].index(number))
            else:
                tile = reinterpret_tile(outs[i], tiles[i].index(number))
                _store_rows(outs[i], values[i] * scale, coordinates, tile)  # mutate: _store_rows (2)
    if len(program.pipeline.turn) > 0:
        tma.store_wait(0)
