"""The persistent forward kernel of windows: items as in persistent.py, each against the keys within its band (band.py).

A window of 1024 keys is 9 tiles a block, so that a program of one block would spend a fifth of its time on its start
and its end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import forward
from .band import load_band_stage, stream_band_keys, tile_of, tiles_of
from .band_place import Band
from .chunks import chunks
from .mainloop import pass_over
from .persistent import allocate_persistent, item_of, load_item, program_of_item, query_items
from .pipeline import Program, load_chunks

_consume_forward = forward.consume


@gluon.jit
def _band_of(block, low, high, N):
    return Band(block.batch, 0, N, low, high, 0, 0)


@gluon.jit
def _produce_band_items(resident, streamed, pipeline, free, items, group, low, high, N, CHUNKS: gl.constexpr):
    """`persistent.produce_items` of the tiles that each block sees, which may be none."""
    KEYS: gl.constexpr = streamed[0].block_shape[2]
    iteration = 0
    begun0 = 0
    begun1 = 0
    for i in range(items.count):
        item = item_of(items, i, group, False)
        band = _band_of(item.block, low, high, N)
        tiles = tiles_of(band, item.block.row0, KEYS)
        for j in range(gl.maximum(tiles.count, 1)):
            if j < tiles.count:
                load_band_stage(
                    streamed, (), pipeline, iteration, band, item.loop.head, tile_of(tiles, j), CHUNKS, load_chunks
                )  # fmt: skip
                iteration += 1
            if j == 0:
                begun0, begun1 = load_item(resident, pipeline, free, item, begun0, begun1, CHUNKS)


@gluon.jit
def _consume_band_items(
    program, statistics, free, items, group, low, high, consumer: gl.constexpr, REGISTER_OPERANDS: gl.constexpr
):  # fmt: skip
    """`persistent.consume_items`, of the tiles that each block sees."""
    KEYS: gl.constexpr = program.pipeline.streamed[0].shape[3]
    STREAM: gl.constexpr = stream_band_keys
    iteration = 0
    begun = 0
    for i in range(items.count):
        item = item_of(items, i, group, False)
        band = _band_of(item.block, low, high, program.N)
        steps = tiles_of(band, item.block.row0, KEYS).count
        if item.takes[consumer]:
            of_item = program_of_item(program, (band,), free, item, begun, iteration)
            _consume_forward(of_item, statistics, consumer, False, REGISTER_OPERANDS, (), STREAM)
            mbarrier.arrive(free.index(of_item.pipeline.turn[0].first + consumer), count=1)
            begun += 1
        else:
            for step in range(steps):
                pass_over(program.pipeline, iteration + step)
        iteration += steps  # mutate: iteration


@gluon.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def band_persistent_forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    scale, low, high, M, N, heads, group,
    STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr, BUFFERS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """o, o_t, lse and mu. A `_rest` is a tensor's second chunk, if it has one."""
    resident = chunks(q, q_rest) + chunks(q_t, q_t_rest)
    streamed = chunks(k, k_rest) + chunks(v, v_rest) + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
    outs = chunks(o, o_rest) + chunks(o_t, o_t_rest)
    CHUNKS: gl.constexpr = len(outs) // 2
    KEYS: gl.constexpr = k.block_shape[2]
    items = query_items(q.shape[0], M, N, heads, group, KEYS, HALVES)
    pipeline, free = allocate_persistent(resident, streamed, (), STAGES, BUFFERS)
    fence_async_shared()
    program = Program(outs, pipeline, (), (), (), (), (), scale, M, N)
    gl.warp_specialize(
        [
            (_produce_band_items, (resident, streamed, pipeline, free, items, group, low, high, N, CHUNKS)),
            (_consume_band_items, (program, (lse, mu), free, items, group, low, high, 0, REGISTER_OPERANDS)),
            (_consume_band_items, (program, (lse, mu), free, items, group, low, high, 1, REGISTER_OPERANDS)),
        ],
        [4, 4],
        [240, 240],
    )
