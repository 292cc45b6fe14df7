"""A tile of backward_query.py whose keys come as pairs (pairs.py): k above k_t, and v above v_t."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .bias import probabilities_of_queries
from .blocks import CONSUMER_ROWS, where_visible
from .chunks import flat
from .packed_mask import where_allowed
from .pairs import split_product, split_rows
from .pipeline import LSE, MU, ROW_A, ROW_DELTA, accumulator, keep_above, left_operand
from .triton_compat import addressed_here


@gluon.jit
def pairs_tile(accs, rows, inputs, program, row, tile, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """Adds what a tile gives to d_q / c and d_q_t / c."""
    acc_q, acc_q_t = flat(accs)
    q, G, q_t, T = flat(inputs.resident)
    k_and_k_t, v_and_v_t = flat(inputs.streamed)
    mu, row_a, delta = rows[MU], rows[ROW_A], rows[ROW_DELTA]
    KEYS: gl.constexpr = k_and_k_t.shape[0] // 2
    TILE: gl.constexpr = accumulator(KEYS)
    WEIGHTS: gl.constexpr = left_operand(2 * CONSUMER_ROWS)
    zero = gl.zeros([CONSUMER_ROWS, 2 * KEYS], gl.float32, accumulator(2 * KEYS))
    s = warpgroup_mma(addressed_here(q), addressed_here(k_and_k_t).permute((1, 0)), zero, use_acc=False, is_async=True)
    a = warpgroup_mma(addressed_here(T), addressed_here(v_and_v_t).permute((1, 0)), zero, use_acc=False, is_async=True)
    s, s_t = split_product(warpgroup_mma_wait(1, deps=[s]))
    k, _k_t = split_rows(k_and_k_t)
    s_t = warpgroup_mma(addressed_here(q_t), k.permute((1, 0)), s_t + 0.0, is_async=True)
    p = probabilities_of_queries(s, rows[LSE], rows[ROW_DELTA + 1 :], program.scale, inputs.bias, TILE)
    if MASKED:
        p = where_visible(p, 0.0, row, tile, program.N, TILE, CAUSAL)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    keep_above(inputs.passed)
    a, b = split_product(warpgroup_mma_wait(1, deps=[a]))
    v, _v_t = split_rows(v_and_v_t)
    b = warpgroup_mma(addressed_here(G), v.permute((1, 0)), b - delta, is_async=True)  # mutate: b
    centred = a - row_a
    ds_t = gl.convert_layout((p * centred).to(k_and_k_t.dtype), WEIGHTS)
    keep_above(inputs.passed)
    k, k_t = split_rows(k_and_k_t)
    acc_q_t = warpgroup_mma(ds_t, k, acc_q_t, is_async=True)
    acc_q = warpgroup_mma(ds_t, k_t, acc_q, is_async=True)  # mutate: acc_q
    s_t = warpgroup_mma_wait(3, deps=[s_t])
    s_t = s_t * program.scale - mu  # mutate: s_t
    b = warpgroup_mma_wait(2, deps=[b])
    ds = gl.convert_layout((p * (s_t * centred + b)).to(k_and_k_t.dtype), WEIGHTS)
    k, _k_t = split_rows(k_and_k_t)
    acc_q = warpgroup_mma(ds, k, acc_q, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc_q, acc_q_t]), rows
