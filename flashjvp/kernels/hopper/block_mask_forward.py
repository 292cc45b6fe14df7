"""The forward kernel under a block mask: that of forward.py, over the blocks of keys that are listed (listed.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .blocks import query_block
from .chunks import chunks
from .forward import consume
from .listed import OF_QUERIES, produce_listed, stream_listed_keys
from .pipeline import Program, allocate_pipeline


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def block_mask_forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    plan, scale, M, N, heads, group, JVP: gl.constexpr, STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head. A `_rest` is a tensor's second chunk, if it has one."""
    resident = chunks(q, q_rest)
    streamed = chunks(k, k_rest) + chunks(v, v_rest)
    outs = chunks(o, o_rest)
    statistics = (lse,)
    CHUNKS: gl.constexpr = len(resident)
    if JVP:
        resident = resident + chunks(q_t, q_t_rest)
        streamed = streamed + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        outs = outs + chunks(o_t, o_t_rest)
        statistics = statistics + (mu,)
    KEYS: gl.constexpr = k.block_shape[-2]
    # the last rows first: where causal, their lists are long
    block, loop = query_block(M, N, heads, group, KEYS, True)  # mutate: block, loop
    pipeline = allocate_pipeline(resident, streamed, (), STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, (plan,), (), (), block, loop, scale, M, N)
    STREAM: gl.constexpr = stream_listed_keys
    gl.warp_specialize(
        [
            (produce_listed, (resident, streamed, (), pipeline, block, loop, plan, M, OF_QUERIES, CHUNKS)),
            (consume, (program, statistics, 0, False, REGISTER_OPERANDS, (), STREAM)),
            (consume, (program, statistics, 1, False, REGISTER_OPERANDS, (), STREAM)),
        ],
        [4, 4],
        [240, 240],
    )
