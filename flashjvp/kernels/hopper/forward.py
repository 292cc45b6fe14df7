"""The forward kernel: o, and under a JVP o_t, of the resident queries, streaming over key tiles; MATH.md (1)-(7'').

The weights of v in o_t are centred on the running mean of S_t, which counts the tile's own scores, too. Centred on the
mean of the tiles before, a key that outweighs all of them would be rounded at its distance from a mean that no longer
counts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from .bias import LOG2_E, add_bias_by_key, bias_of_head, bias_operand
from .blocks import CONSUMER_ROWS, query_block, where_visible
from .chunks import (
    add,
    add_product,
    add_scores,
    chunks,
    complete,
    lazy_rescale,
    left_operands,
    scale_rows,
)
from .mainloop import begin, stream_keys
from .packed_mask import packed_by_key, where_allowed
from .pipeline import Program, accumulator, allocate_pipeline, keep_above, optional, produce, softmax_scale_of
from .results import store_results
from .scales import MU, O
from .triton_compat import sum_of_products

# The lazy rescale threshold, in base 2. The "maximum" m of a row follows the scores only when they are so far above it:
# P stays below 2, and accumulators are seldom rescaled. A key that outweighs its row mostly becomes the maximum. Its P
# is then 1, which bfloat16 keeps. With a threshold of 8 it is any number up to 256, and the worst rows of o left their
# budget.
RESCALE_THRESHOLD = gl.constexpr(1.0)


@gluon.constexpr_function
def _subtracts_first(dtype):
    """Whether the maximum is subtracted from the scores before they are scaled. P of the largest score is then exactly
    1, which types with more digits than bfloat16 need. Otherwise it is 1 up to the rounding of the scaled maximum, the
    same for all keys of a row; that takes one instruction a score less. With an additive mask it is subtracted first in
    all types, since scores may be large."""
    return dtype != gl.bfloat16


@gluon.jit
def softmax(
    s, m, l, inputs, program, row, tile, dtype: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """(p, rowsum(p), new l, new m, alpha) of a tile, as in MATH.md section 2; the scale is positive.

    m is the maximum of scores in base 2, which follows them by RESCALE_THRESHOLD. Where `_subtracts_first`, it is the
    plain maximum of the products q @ k.T, before they are scaled, or with an additive mask of scores in nats.
    """
    BIASED: gl.constexpr = len(inputs.bias) > 0
    SUBTRACT_FIRST: gl.constexpr = BIASED or _subtracts_first(dtype)
    if BIASED:
        s = add_bias_by_key(s, program.scale, inputs.bias, LAYOUT)
        scale2 = LOG2_E  # mutate: scale2
    else:
        scale2 = program.scale * 1.4426950408889634
    if MASKED:
        s = where_visible(s, float("-inf"), row, tile, program.N, LAYOUT, CAUSAL)
    s = where_allowed(s, inputs.mask, float("-inf"), LAYOUT)
    tile_max = gl.max(s, 1)
    if SUBTRACT_FIRST:
        m_new = gl.maximum(m, tile_max)
    else:
        m_new = gl.where(tile_max * scale2 > m + RESCALE_THRESHOLD, tile_max * scale2, m)
    m_safe = m_new
    if len(inputs.mask) + len(inputs.bias) > 0:  # no key so far may be allowed
        m_safe = gl.where(m_new > float("-inf"), m_new, 0.0)  # mutate: m_safe
    if SUBTRACT_FIRST:
        alpha = gl.exp2((m - m_safe) * scale2)
        p = gl.exp2((s - m_safe[:, None]) * scale2)
    else:
        alpha = gl.exp2(m - m_safe)  # mutate: alpha
        p = gl.exp2(s * scale2 - m_safe[:, None])
    tile_sum = gl.sum(p, 1)
    return p, tile_sum, l * alpha + tile_sum, m_new, alpha  # mutate: return p tile_sum


@gluon.jit
def maximum_in_base_2(m, scale, dtype: gl.constexpr):
    """The maximum of `softmax`, without an additive mask, as scores in base 2."""
    SUBTRACT_FIRST: gl.constexpr = _subtracts_first(dtype)
    return m if not SUBTRACT_FIRST else m * (scale * 1.4426950408889634)


@gluon.jit
def divisor(l, x):
    """l as a divisor: 1 for a row without allowed keys, where it is 0. `x` has the masks."""
    if len(x.mask) + len(x.bias) > 0:
        l = gl.where(l > 0.0, l, 1.0)  # mutate: l
    return l


@gluon.jit
def _plain_tile(accs, state, inputs, program, row, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds a tile to o, without tangents."""
    m, l = state
    k, v = inputs.streamed
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    WIDE: gl.constexpr = v[0].shape[1] > 64  # else a branch takes longer than the products that it skips
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    s = warpgroup_mma_wait(0, deps=[add_scores(zero, inputs.resident[0], k, USE_ACC=False)])
    p, _tile_sum, l, m, alpha = softmax(s, m, l, inputs, program, row, tile, v[0].dtype, TILE, CAUSAL, MASKED)
    acc_o = lazy_rescale(accs[0], alpha) if WIDE else scale_rows(accs[0], alpha)
    acc_o = add_product(acc_o, left_operands(p.to(v[0].dtype), v), v)
    return complete(acc_o), (m, l)


@gluon.jit
def _tangent_tile(accs, state, inputs, program, row, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds a tile to o and o_t."""
    acc_o, acc_o_t = accs
    m, l, mean = state
    q, q_t = inputs.resident
    k, v, k_t, v_t = inputs.streamed
    scale = program.scale
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    # P is multiplied with v_t while S_t is awaited: faster where a product is several, if there are registers for it.
    EARLY: gl.constexpr = KEYS <= 64 and CHUNKS > 1
    zero = gl.zeros([CONSUMER_ROWS, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    s_t = add_scores(zero, q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)  # mutate: s_t (1)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p, tile_sum, l, m, alpha = softmax(s, m, l, inputs, program, row, tile, v[0].dtype, TILE, CAUSAL, MASKED)
    acc_o_t = lazy_rescale(acc_o_t, alpha, HERE=not EARLY)
    acc_o = lazy_rescale(acc_o, alpha, HERE=not EARLY)
    weights = left_operands(p.to(v[0].dtype), v)
    keep_above(inputs.passed)
    if EARLY:
        acc_o_t = add_product(acc_o_t, weights, v_t)
    s_t = warpgroup_mma_wait(CHUNKS if EARLY else 0, deps=[s_t])  # mutate: s_t (2)
    # mutate: negative_step
    negative_step = (mean * tile_sum - sum_of_products(p, s_t, 8, TILE) * scale) / divisor(l, inputs)
    mean -= negative_step
    # mutate: weights_t
    weights_t = left_operands((p * (s_t * scale - mean[:, None])).to(v[0].dtype), v)
    if EARLY:
        keep_above(inputs.passed)
        acc_o_t = add(complete(acc_o_t), scale_rows(acc_o, negative_step))  # mutate: acc_o_t (1)
    else:
        # mutate: acc_o_t (2)
        acc_o_t = add_product(add(acc_o_t, scale_rows(acc_o, negative_step)), weights, v_t)
    acc_o_t = add_product(acc_o_t, weights_t, v)
    acc_o = add_product(acc_o, weights, v)
    return complete(acc_o + acc_o_t), (m, l, mean)


@gluon.jit
def consume(
    program, statistics, consumer: gl.constexpr, CAUSAL: gl.constexpr, REGISTER_OPERANDS: gl.constexpr,
    BIAS_LAYOUT: gl.constexpr, stream: gl.constexpr = stream_keys,
):  # fmt: skip
    """A consumer: 64 queries."""
    outs, pipeline, block = program.outs, program.pipeline, program.block
    JVP: gl.constexpr = len(statistics) == 2
    CHUNKS: gl.constexpr = len(outs) // len(statistics)
    KEYS: gl.constexpr = pipeline.streamed[0].shape[3]
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(KEYS))
    ADD_TILE: gl.constexpr = _tangent_tile if JVP else _plain_tile
    state = (gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, ROW), gl.zeros([CONSUMER_ROWS], gl.float32, ROW))
    values = pipeline.streamed[CHUNKS : 2 * CHUNKS]
    if JVP:
        state = state + (gl.zeros([CONSUMER_ROWS], gl.float32, ROW),)
        values = values + values
    accs, register_operands = begin(program, consumer, values, REGISTER_OPERANDS, CHUNKS, KEYS)
    accs, state = stream(
        ADD_TILE, accs, state, register_operands, program, consumer, CHUNKS, CAUSAL, BIAS_LAYOUT, MASK_AHEAD=not JVP
    )
    rows = block.row0 + consumer * CONSUMER_ROWS + gl.arange(0, CONSUMER_ROWS, ROW)
    offset = (block.batch.to(gl.int64) * program.loop.query_heads + block.head) * program.M + rows
    if JVP:
        m, l, mu = state
    else:
        m, l = state
    norm = 1.0 / divisor(l, program)  # a row without keys has zeros, and -inf for lse
    if len(program.bias) > 0:  # m and log(l): layout.empty_lse
        gl.store(statistics[0] + offset * 2, m, mask=rows < program.M)
        # mutate: gl.store (2)
        gl.store(statistics[0] + offset * 2 + 1, gl.log2(norm) * -0.6931471805599453, mask=rows < program.M)
    else:
        lse = maximum_in_base_2(m, program.scale, pipeline.resident[0].dtype) - gl.log2(norm)
        gl.store(statistics[0] + offset, lse * 0.6931471805599453, mask=rows < program.M)  # mutate: gl.store
    if JVP:
        if len(program.tensor_scales) > 0:
            mu = mu * gl.load(program.tensor_scales[0] + MU)
        gl.store(statistics[1] + offset, mu, mask=rows < program.M)
    store_results(program, scale_rows(accs, norm), consumer, CHUNKS, O, 1)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    mask, bias, tensor_scales, scale, M, N, heads, group,
    JVP: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, REGISTER_OPERANDS: gl.constexpr,
    VARIES: gl.constexpr, BIAS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head against all keys. A `_rest` is a tensor's second chunk, if it has one."""
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
    scale = softmax_scale_of(tensor_scales, scale)
    block, loop = query_block(M, N, heads, group, KEYS, CAUSAL)
    packed_mask = packed_by_key(mask, block.batch, block.head, heads, M, N, VARIES)
    bias = bias_of_head(bias_operand(bias, None), block.batch, block.head)
    pipeline = allocate_pipeline(resident, streamed, (), STAGES)
    fence_async_shared()
    program = Program(outs, pipeline, packed_mask, bias, optional(tensor_scales), block, loop, scale, M, N)
    gl.warp_specialize(
        [
            (produce, (resident, streamed, (), pipeline, block, loop, CHUNKS)),
            (consume, (program, statistics, 0, CAUSAL, REGISTER_OPERANDS, BIAS_LAYOUT)),
            (consume, (program, statistics, 1, CAUSAL, REGISTER_OPERANDS, BIAS_LAYOUT)),
        ],
        [4, 4],
        [240, 240],
    )
