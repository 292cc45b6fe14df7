"""The forward kernel of head dims above 128, under a JVP: o and o_t of 64 resident queries, streaming over key tiles;
MATH.md (1)-(7'').

As in forward.py, but for the layout (wide_pipeline.py). k and k_t are the first tiles, v and v_t the second.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from .blocks import CONSUMER_ROWS, query_block
from .chunks import (
    add,
    add_product,
    add_scores,
    chunks,
    complete,
    lazy_rescale,
    scale_rows,
)
from .forward import _divisor, _softmax, _subtracts_first
from .pipeline import Program, accumulator, keep_above
from .results import store_results
from .triton_compat import sum_of_products
from .scales import O
from .wide_pipeline import WARPS, allocate_wide_pipeline, await_second, begin_wide, produce_wide, release_first, shared_operands, stream_keys_wide


@gluon.jit
def _tile(accs, state, inputs, program, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds a tile to o and o_t."""
    acc_o, acc_o_t = accs
    m, l, mean = state
    q, q_t = inputs.resident
    k, k_t = inputs.first
    v, v_t = inputs.second
    scale = program.scale
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS, WARPS)
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    s_t = add_scores(zero, q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p, tile_sum, l, m, alpha = _softmax(s, m, l, (), program, program.block.row0, tile, v[0].dtype, TILE, CAUSAL, MASKED)
    acc_o_t = lazy_rescale(acc_o_t, alpha)
    acc_o = lazy_rescale(acc_o, alpha)
    weights = shared_operands(p.to(v[0].dtype), inputs.weights, 0, v)
    await_second(inputs)
    acc_o_t = add_product(acc_o_t, weights, v_t)
    s_t = warpgroup_mma_wait(CHUNKS, deps=[s_t])
    release_first(inputs)
    negative_step = (mean * tile_sum - sum_of_products(p, s_t, 8, TILE) * scale) / l
    mean -= negative_step
    weights_t = shared_operands((p * (s_t * scale - mean[:, None])).to(v[0].dtype), inputs.weights, 1, v)
    keep_above(inputs.second_full)
    acc_o_t = add(complete(acc_o_t), scale_rows(acc_o, negative_step))
    acc_o_t = add_product(acc_o_t, weights_t, v)
    acc_o = add_product(acc_o, weights, v)
    return complete(acc_o + acc_o_t), (m, l, mean)


@gluon.jit
def _consume(program, lse, mu, CHUNKS: gl.constexpr, CAUSAL: gl.constexpr):
    """The consumer: 64 queries."""
    pipeline, block = program.pipeline, program.block
    KEYS: gl.constexpr = pipeline.first.tiles[0].shape[3]
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(KEYS, WARPS))
    zero = gl.zeros([CONSUMER_ROWS], gl.float32, ROW)
    state = (gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, ROW), zero, zero)
    accs, state = stream_keys_wide(_tile, begin_wide(program), state, program, CHUNKS, CAUSAL)
    m, l, mean = state
    rows = block.row0 + gl.arange(0, CONSUMER_ROWS, ROW)
    offset = (block.batch.to(gl.int64) * program.loop.query_heads + block.head) * program.M + rows
    norm = 1.0 / l
    SUBTRACT_FIRST: gl.constexpr = _subtracts_first(pipeline.resident[0].dtype)
    log2_sum = (m if not SUBTRACT_FIRST else m * (program.scale * 1.4426950408889634)) - gl.log2(norm)
    gl.store(lse + offset, log2_sum * 0.6931471805599453, mask=rows < program.M)
    gl.store(mu + offset, mean, mask=rows < program.M)
    store_results(program, scale_rows(accs, norm), 0, CHUNKS, O, 1)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    scale, M, N, heads, group, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 64 queries of one head against all keys. A `_rest` is a tensor's second chunk, if it has one."""
    resident = chunks(q, q_rest) + chunks(q_t, q_t_rest)
    first = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    second = chunks(v, v_rest) + chunks(v_t, v_t_rest)
    outs = chunks(o, o_rest) + chunks(o_t, o_t_rest)
    CHUNKS: gl.constexpr = len(outs) // 2
    KEYS: gl.constexpr = k.block_shape[2]
    block, loop = query_block(M, N, heads, group, KEYS, CAUSAL, 1)
    pipeline = allocate_wide_pipeline(resident, first, second, (), STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, (), (), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce_wide, (resident, first, second, (), pipeline, block, loop, CHUNKS)),
            (_consume, (program, lse, mu, CHUNKS, CAUSAL)),
        ],
        [8],
        [240],
    )
