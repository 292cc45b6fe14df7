"""The forward kernel of head dims above 128, under a JVP: o and o_t of 64 resident queries, streaming over key tiles;
MATH.md (1)-(7'').

One consumer computes S and P, the other one S_t and its weights (wide_pipeline.py). The order of arithmetic is that of
forward.py. k and k_t are the first tiles, v and v_t the second.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from .bias import bias_of_head, bias_operand
from .blocks import CONSUMER_ROWS, query_block
from .chunks import add, add_product, add_scores, chunks, complete, lazy_rescale, left_operands, scale_rows
from .forward import divisor, maximum_in_base_2, softmax
from .packed_mask import packed_by_key
from .pipeline import Program, accumulator, keep_above
from .triton_compat import sum_of_products
from .wide_exchange import (
    ALPHA,
    NEGATIVE_STEP,
    SUM,
    TILE_SUM,
    WEIGHTS_T,
    P,
    allocate_exchange,
    await_given,
    chunk_of,
    give,
    load_numbers,
    load_row_number,
    load_weights,
    store_numbers,
    store_row_number,
    store_weights,
)
from .wide_pipeline import (
    allocate_wide_pipeline,
    await_first,
    await_second,
    begin_wide,
    produce_wide,
    release_first,
    store_chunk,
    stream_keys_wide,
)


@gluon.jit
def _add_to_o_t(acc_o, acc_o_t, negative_step, weights, weights_t, v):
    """Completes a tile: o_t is centred on the new mean before the tile's weights of v are added, as those are."""
    acc_o_t = add(complete(acc_o_t), scale_rows(acc_o, negative_step))  # mutate: acc_o_t
    acc_o_t = add_product(acc_o_t, weights_t, v)
    acc_o = add_product(acc_o, weights, v)
    return complete(acc_o + acc_o_t)


@gluon.jit
def _tile_of_s(accs, state, inputs, program, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds a tile to the first chunk of o and o_t."""
    m, l = state
    q = inputs.resident[0]
    k = inputs.first[0]
    v, v_t = chunk_of(inputs.second, 0)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    await_first(inputs)
    s = add_scores(gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE), q, k, USE_ACC=False)
    s = warpgroup_mma_wait(0, deps=[s])
    release_first(inputs)
    p, tile_sum, l, m, alpha = softmax(
        s, m, l, inputs, program, program.block.row0, tile, v[0].dtype, TILE, CAUSAL, MASKED
    )
    store_numbers(inputs, p)
    store_row_number(inputs, ALPHA, alpha)
    store_row_number(inputs, TILE_SUM, tile_sum)
    store_row_number(inputs, SUM, l)  # mutate: store_row_number
    give(inputs, P)
    acc_o_t = lazy_rescale((accs[1],), alpha)
    acc_o = lazy_rescale((accs[0],), alpha)
    weights = left_operands(p.to(v[0].dtype), v)
    await_second(inputs)
    acc_o_t = add_product(acc_o_t, weights, v_t)
    await_given(inputs, WEIGHTS_T)
    negative_step, weights_t = load_row_number(inputs, NEGATIVE_STEP), load_weights(inputs, 0, v)
    return _add_to_o_t(acc_o, acc_o_t, negative_step, weights, weights_t, v), (m, l)


@gluon.jit
def _tile_of_s_t(accs, state, inputs, program, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds a tile to the second chunk of o and o_t."""
    mean, _l = state
    q, q_t = inputs.resident
    k, k_t = inputs.first
    v, v_t = chunk_of(inputs.second, 1)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    await_first(inputs)
    s_t = add_scores(gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE), q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)
    await_second(inputs)
    await_given(inputs, P)
    p, alpha = load_numbers(inputs), load_row_number(inputs, ALPHA)
    tile_sum, l = load_row_number(inputs, TILE_SUM), load_row_number(inputs, SUM)
    acc_o_t = lazy_rescale((accs[1],), alpha)
    acc_o = lazy_rescale((accs[0],), alpha)
    weights = left_operands(p.to(v[0].dtype), v)
    keep_above(inputs.second_full)
    acc_o_t = add_product(acc_o_t, weights, v_t)
    s_t = warpgroup_mma_wait(1, deps=[s_t])
    release_first(inputs)
    # mutate: negative_step
    negative_step = (mean * tile_sum - sum_of_products(p, s_t, 8, TILE) * program.scale) / divisor(l, program)
    mean -= negative_step
    weights_t = (p * (s_t * program.scale - mean[:, None])).to(v[0].dtype)  # mutate: weights_t
    store_weights(inputs, 0, weights_t)
    store_row_number(inputs, NEGATIVE_STEP, negative_step)
    give(inputs, WEIGHTS_T)
    accs = _add_to_o_t(acc_o, acc_o_t, negative_step, weights, left_operands(weights_t, v), v)
    return accs, (mean, l)


@gluon.jit
def _consume(program, statistic, CHUNK: gl.constexpr, CAUSAL: gl.constexpr, BIAS_LAYOUT: gl.constexpr):
    """A consumer: one chunk of o and o_t of 64 queries, and lse or mu."""
    pipeline, block = program.pipeline, program.block
    KEYS: gl.constexpr = pipeline.first.tiles[0].shape[3]
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(KEYS))
    outs = (program.outs[CHUNK], program.outs[2 + CHUNK])
    FIRST: gl.constexpr = float("-inf") if CHUNK == 0 else 0.0
    TILE: gl.constexpr = _tile_of_s if CHUNK == 0 else _tile_of_s_t
    state = (gl.full([CONSUMER_ROWS], FIRST, gl.float32, ROW), gl.zeros([CONSUMER_ROWS], gl.float32, ROW))
    accs, state = stream_keys_wide(TILE, begin_wide(program, outs), state, program, CAUSAL, BIAS_LAYOUT)
    number, l = state  # the maximum, or the mean of S_t
    norm = 1.0 / divisor(l, program)  # a row without keys has zeros, and -inf for lse
    if CHUNK == 0 and len(program.bias) == 0:
        maximum = maximum_in_base_2(number, program.scale, pipeline.resident[0].dtype)
        number = (maximum - gl.log2(norm)) * 0.6931471805599453
    rows = block.row0 + gl.arange(0, CONSUMER_ROWS, ROW)
    offset = (block.batch.to(gl.int64) * program.loop.query_heads + block.head) * program.M + rows
    if CHUNK == 0 and len(program.bias) > 0:  # m and log(l): layout.empty_lse
        log_l = gl.log2(norm) * -0.6931471805599453
        gl.store(statistic + offset * 2, number, mask=rows < program.M)
        gl.store(statistic + offset * 2 + 1, log_l, mask=rows < program.M)  # mutate: gl.store
    else:
        gl.store(statistic + offset, number, mask=rows < program.M)
    store_chunk(program, outs, scale_rows(accs, norm), CHUNK)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def wide_forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    mask, bias, scale, M, N, heads, group,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 64 queries of one head against all keys. A `_rest` is a tensor's second chunk."""
    resident = chunks(q, q_rest) + chunks(q_t, q_t_rest)
    first = chunks(k, k_rest) + chunks(k_t, k_t_rest)
    second = chunks(v, v_rest) + chunks(v_t, v_t_rest)
    outs = chunks(o, o_rest) + chunks(o_t, o_t_rest)
    KEYS: gl.constexpr = k.block_shape[2]
    block, loop = query_block(M, N, heads, group, KEYS, CAUSAL, 1)
    packed_mask = packed_by_key(mask, block.batch, block.head, heads, M, N, VARIES)
    bias = bias_of_head(bias_operand(bias, None), block.batch, block.head)
    pipeline = allocate_wide_pipeline(resident, first, second, (), allocate_exchange(k, 1), STAGES, 2)
    fence_async_shared()
    program = Program(outs, pipeline, packed_mask, bias, (), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce_wide, (resident, first, second, (), pipeline, block, loop)),
            (_consume, (program, lse, 0, CAUSAL, BIAS_LAYOUT)),
            (_consume, (program, mu, 1, CAUSAL, BIAS_LAYOUT)),
        ],
        [4, 4],
        [240, 240],
    )
