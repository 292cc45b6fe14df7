"""A tile of backward_key.py whose queries come as pairs (pairs.py), at a head dim of 64: q above q_t, and T above G."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from .bias import probabilities_of_keys
from .blocks import CONSUMER_ROWS, where_causal
from .chunks import add_product, add_scores, complete, left_operands
from .packed_mask import where_allowed
from .pairs import split_product, split_rows
from .pipeline import LSE, MU, ROW_A, ROW_DELTA, accumulator, keep_above, row_statistic


@gluon.jit
def pairs_tile(accs, dq, inputs, program, at, consumer: gl.constexpr, CAUSAL: gl.constexpr, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_k / c, d_v, d_k_t / c and d_v_t. At this head dim nothing is added to d_q: `dq` is
    empty."""
    k, v, k_t, v_t = inputs.resident
    acc_k, acc_v, acc_k_t, acc_v_t = accs
    q_and_q_t, T_and_G = inputs.streamed
    stats = inputs.stats
    ROWS: gl.constexpr = stats.shape[1]
    TILE: gl.constexpr = accumulator(ROWS)
    zero = gl.zeros([CONSUMER_ROWS, 2 * ROWS], gl.float32, accumulator(2 * ROWS))
    s = add_scores(zero, k, q_and_q_t, USE_ACC=False)
    a = add_scores(zero, v, T_and_G, USE_ACC=False)
    lse = row_statistic(stats, LSE, TILE)
    s, s_t = split_product(warpgroup_mma_wait(1, deps=[s]))
    q, q_t = split_rows(q_and_q_t[0])
    s_t = add_scores(s_t + 0.0, k_t, (q,), WHOLE=False)  # mutate: s_t
    p = probabilities_of_keys(s, lse, program.scale, inputs.bias, inputs.passed, TILE)
    if CAUSAL:
        p = where_causal(p, at.tile, program, consumer, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    keep_above(inputs.passed)
    weights = left_operands(p.to(q.dtype), k)
    T, G = split_rows(T_and_G[0])
    acc_v_t = add_product(acc_v_t, weights, (T,), WHOLE=False)
    acc_v = add_product(acc_v, weights, (G,), WHOLE=False)  # mutate: acc_v
    row_a = row_statistic(stats, ROW_A, TILE)
    delta = row_statistic(stats, ROW_DELTA, TILE)
    a, b = split_product(warpgroup_mma_wait(3, deps=[a]))
    T, _G = split_rows(T_and_G[0])
    b = add_scores(b - delta, v_t, (T,), WHOLE=False)  # mutate: b
    centred = a - row_a
    weights_t = left_operands((p * centred).to(q.dtype), k)
    keep_above(inputs.passed)
    q, q_t = split_rows(q_and_q_t[0])
    acc_k = add_product(acc_k, weights_t, (q_t,), WHOLE=False)  # mutate: acc_k
    acc_k_t = add_product(acc_k_t, weights_t, (q,), WHOLE=False)
    mu = row_statistic(stats, MU, TILE)
    s_t = warpgroup_mma_wait(5, deps=[s_t])
    s_t = s_t * program.scale - mu  # mutate: s_t (2)
    T, _G = split_rows(T_and_G[0])
    acc_v = add_product(acc_v, left_operands((p * s_t).to(q.dtype), k), (T,), WHOLE=False)  # mutate: acc_v (2)
    b = warpgroup_mma_wait(3, deps=[b])
    ds = (p * (s_t * centred + b)).to(q.dtype)
    q, _q_t = split_rows(q_and_q_t[0])
    acc_k = add_product(acc_k, left_operands(ds, k), (q,), WHOLE=False)
    return complete(acc_k + acc_v + acc_k_t + acc_v_t)
