"""The kernels of persistent programs (persistent.py): what consumers compute of an item is what those of forward.py
backward_query.py and backward_key.py compute of their block, bit by bit. They serve calls
with tangents, without masks, not causal."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import backward_key, backward_query, forward
from .chunks import chunks
from .operands import key_operands, query_operands
from .pairs import allocate_narrow_pairs, load_pairs
from .persistent import allocate_persistent, consume_items, key_items, produce_items, query_items
from .pipeline import Program, allocate_tiles, load_chunks

_consume_forward = forward.consume
_consume_queries = backward_query.consume
_consume_keys = backward_key.consume


@gluon.jit
def _forward_item(program, statistics, consumer: gl.constexpr, REGISTER_OPERANDS: gl.constexpr):
    _consume_forward(program, statistics, consumer, False, REGISTER_OPERANDS, ())


@gluon.jit
def _query_item(program, stats, consumer: gl.constexpr, REGISTER_OPERANDS: gl.constexpr):
    _consume_queries(program, stats[0], consumer, True, False, REGISTER_OPERANDS, ())


@gluon.jit
def _key_item(program, rest, consumer: gl.constexpr, REGISTER_OPERANDS: gl.constexpr):
    CHUNKS: gl.constexpr = len(program.outs) // 4
    _consume_keys(program, (), consumer, CHUNKS, True, False, REGISTER_OPERANDS, 1, False, (), 0)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def persistent_forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    scale, M, N, heads, group,
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
    CONSUME: gl.constexpr = _forward_item
    gl.warp_specialize(
        [
            (produce_items, (resident, streamed, (), pipeline, free, items, group, False, CHUNKS)),
            (consume_items, (CONSUME, program, (lse, mu), free, items, group, 0, False, REGISTER_OPERANDS)),
            (consume_items, (CONSUME, program, (lse, mu), free, items, group, 1, False, REGISTER_OPERANDS)),
        ],
        [4, 4],
        [240, 240],
    )


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def persistent_query_kernel(
    q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, stats,
    d_q, d_q_rest, d_q_t, d_q_t_rest, scale, M, N, heads, group,
    STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr, BUFFERS: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """d_q and d_q_t. A `_rest` is a tensor's second chunk, if it has one."""
    resident, streamed, outs = query_operands(
        q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest,
        d_q, d_q_rest, d_q_t, d_q_t_rest, True,
    )  # fmt: skip
    CHUNKS: gl.constexpr = 1 if q_rest is None else 2
    KEYS: gl.constexpr = k.block_shape[2]
    gdc_launch_dependents()
    items = query_items(q.shape[0], M, N, heads, group, KEYS, HALVES)
    pipeline, free = allocate_persistent(resident, streamed, (), STAGES, BUFFERS)
    fence_async_shared()
    program = Program(outs, pipeline, (), (), (), (), (), scale, M, N)
    CONSUME: gl.constexpr = _query_item
    gl.warp_specialize(
        [
            (produce_items, (resident, streamed, (), pipeline, free, items, group, False, CHUNKS)),
            (consume_items, (CONSUME, program, (stats,), free, items, group, 0, False, REGISTER_OPERANDS)),
            (consume_items, (CONSUME, program, (stats,), free, items, group, 1, False, REGISTER_OPERANDS)),
        ],
        [4, 4],
        [240, 240],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def persistent_key_kernel(
    k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest, stats,
    d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, scale, M, N, heads, group,
    STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr, BUFFERS: gl.constexpr, HALVES: gl.constexpr,
    PAIRS: gl.constexpr,
):  # fmt: skip
    """d_k, d_v, d_k_t and d_v_t. A `_rest` is a tensor's second chunk, if it has one. With PAIRS queries come as pairs
    (backward_key_pairs.py)."""
    resident, streamed, outs = key_operands(
        k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, q, q_rest, G, G_rest, q_t, q_t_rest, T, T_rest,
        d_k, d_k_rest, d_v, d_v_rest, d_k_t, d_k_t_rest, d_v_t, d_v_t_rest, True, True, PAIRS,
    )  # fmt: skip
    CHUNKS: gl.constexpr = 1 if k_rest is None else 2
    ALLOCATE: gl.constexpr = allocate_narrow_pairs if PAIRS else allocate_tiles
    LOAD: gl.constexpr = load_pairs if PAIRS else load_chunks
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_wait()  # for the statistics
    gdc_launch_dependents()
    items = key_items(k.shape[0], M, N, heads, group, ROWS, HALVES)  # mutate: items
    pipeline, free = allocate_persistent(resident, streamed, (stats,), STAGES, BUFFERS, ALLOCATE)
    fence_async_shared()
    program = Program(outs, pipeline, (), (), (), (), (), scale, M, N)
    CONSUME: gl.constexpr = _key_item
    gl.warp_specialize(
        [
            (produce_items, (resident, streamed, (stats,), pipeline, free, items, group, True, CHUNKS, LOAD)),
            (consume_items, (CONSUME, program, (), free, items, group, 0, True, REGISTER_OPERANDS)),
            (consume_items, (CONSUME, program, (), free, items, group, 1, True, REGISTER_OPERANDS)),
        ],
        [4, 4],
        [240, 240],
    )
