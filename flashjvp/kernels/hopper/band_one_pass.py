"""The kernel of backward_one_pass.py for windows and packed sequences: over the queries within a band (band.py).

Both consumers work on the same 64 keys, so they see the same tiles and pass over none. Only the first one needs the
mask: it gives P, with zeros in it, to the second.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backward_one_pass import add_queries, allocate_one_pass, consume
from .band import end_of, produce_band, seen_by, tiles_of, visible
from .band_place import place_of_keys
from .blocks import CONSUMER_ROWS
from .chunks import chunks
from .pairs import are_pairs, load_pairs
from .pipeline import Program, load_chunks


@gluon.jit
def _stream_band(
    add_tile: gl.constexpr, accs, exchange, dq_accums, program, consumer: gl.constexpr, CHUNKS: gl.constexpr,
    DQ_COLUMNS: gl.constexpr,
):  # fmt: skip
    """The mainloop of backward_one_pass.py, over the tiles that the resident keys see. d_q is not accumulated."""
    block, loop, band = program.block, program.loop, program.mask[0]
    ROWS: gl.constexpr = program.pipeline.stats[0].shape[2]
    tiles = tiles_of(band, block.row0, ROWS, CONSUMER_ROWS)
    seen = seen_by(band, block.row0)
    iteration = 0
    for _member in range(loop.heads):
        for _tile in range(tiles.whole):
            accs = add_queries(
                add_tile, accs, exchange, dq_accums, program, (), 0, iteration, CHUNKS, DQ_COLUMNS
            )  # fmt: skip
            iteration += 1
        for side in range(2):
            first, end, shift = end_of(tiles, side)
            for i in range(first, end):
                mask = ()
                if consumer == 0:
                    mask = visible(seen, program.N - block.row0, i + shift, ROWS)  # mutate: mask
                accs = add_queries(
                    add_tile, accs, exchange, dq_accums, program, mask, 0, iteration, CHUNKS, DQ_COLUMNS
                )  # fmt: skip
                iteration += 1
    return accs, iteration


@gluon.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def band_one_pass_kernel(
    k, k_rest, k_t, k_t_rest, v, v_rest, v_t, v_t_rest, q, q_rest, q_t, q_t_rest, T, T_rest, G, G_rest, stats,
    d_v, d_v_rest, d_v_t, d_v_t_rest, d_k, d_k_rest, d_k_t, d_k_t_rest, cu, scale, low, high, M, N, heads, group,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 64 keys of one key head, and with `cu` of one sequence. A `_rest` is a tensor's second chunk."""
    of_keys = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    of_values = chunks(v, v_rest) + chunks(v_t, v_t_rest)
    streamed = chunks(q, q_rest) + chunks(q_t, q_t_rest) + chunks(T, T_rest) + chunks(G, G_rest)
    outs_of_values = chunks(d_v, d_v_rest) + chunks(d_v_t, d_v_t_rest)
    outs_of_keys = chunks(d_k, d_k_rest) + chunks(d_k_t, d_k_t_rest)
    CHUNKS: gl.constexpr = len(of_keys) // 2
    ROWS: gl.constexpr = q.block_shape[-2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    block, loop, band = place_of_keys(cu, low, high, M, N, heads, group, ROWS, 1)  # mutate: block, loop, band
    first, second, exchange = allocate_one_pass(of_keys, of_values, streamed, stats, STAGES)
    fence_async_shared()
    program = Program(outs_of_values, first, (band,), (), (), block, loop, scale, M, N)
    program_of_keys = Program(outs_of_keys, second, (band,), (), (), block, loop, scale, M, N)
    STREAM: gl.constexpr = _stream_band
    LOAD: gl.constexpr = load_pairs if are_pairs(of_keys, streamed) else load_chunks
    gl.warp_specialize(
        [
            (produce_band, (of_keys + of_values, streamed, (stats,), first, block, loop, band, CHUNKS, LOAD)),
            (consume, (program, exchange, (), 0, CHUNKS, 0, STREAM)),
            (consume, (program_of_keys, exchange, (), 1, CHUNKS, 0, STREAM)),
        ],
        [4, 4],
        [240, 240],
    )
