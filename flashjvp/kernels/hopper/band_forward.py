"""The forward kernel of windows and packed sequences: that of forward.py, over the keys within a band (band.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .band import produce_band, stream_band_keys
from .band_place import moved, place_of_queries
from .chunks import chunks
from .forward import consume
from .pipeline import ENTRIES, Program, allocate_pipeline


@gluon.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def band_forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    cu, scale, low, high, M, N, heads, group, JVP: gl.constexpr, STAGES: gl.constexpr,
    REGISTER_OPERANDS: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head, and with `cu` of one sequence. A `_rest` is a tensor's second chunk."""
    resident = chunks(q, q_rest)
    streamed = chunks(k, k_rest) + chunks(v, v_rest)
    outs = chunks(o, o_rest)
    KEYS: gl.constexpr = k.block_shape[-2]
    block, loop, band = place_of_queries(cu, low, high, M, N, heads, group, KEYS)  # mutate: block, loop, band
    if cu is not None:
        lse = moved(lse, block, heads, block.batch - ENTRIES, M)
    statistics = (lse,)
    CHUNKS: gl.constexpr = len(resident)
    if JVP:
        resident = resident + chunks(q_t, q_t_rest)
        streamed = streamed + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        outs = outs + chunks(o_t, o_t_rest)
        if cu is not None:
            mu = moved(mu, block, heads, block.batch - ENTRIES, M)
        statistics = statistics + (mu,)
    pipeline = allocate_pipeline(resident, streamed, (), STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, (band,), (), (), block, loop, scale, M, N)
    STREAM: gl.constexpr = stream_band_keys
    gl.warp_specialize(
        [
            (produce_band, (resident, streamed, (), pipeline, block, loop, band, CHUNKS)),
            (consume, (program, statistics, 0, False, REGISTER_OPERANDS, (), STREAM)),
            (consume, (program, statistics, 1, False, REGISTER_OPERANDS, (), STREAM)),
        ],
        [4, 4],
        [240, 240],
    )
