"""What the two backward kernels recompute for one tile of queries and keys, in either orientation; MATH.md (1)-(14).

With KEYS_FIRST a tile is [keys, queries], so that products over queries take it as their left operand from registers;
otherwise it is [queries, keys]. Row statistics come shaped to broadcast to the tile.
"""

import triton
import triton.language as tl

from .tiles import apply_mask, scores_sum


@triton.jit
def _products(
    query,
    key,
    query2,
    key2,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """query @ key.T + query2 @ key2.T, transposed if KEYS_FIRST, without a product that lacks a factor."""
    if KEYS_FIRST:
        return scores_sum(key, query, key2, query2, FIRST, SECOND, PRECISION)
    else:
        return scores_sum(query, key, query2, key2, FIRST, SECOND, PRECISION)


@triton.jit
def probabilities(
    q, k, q_t, k_t, lse, mu, mask, scale, rows, columns, M, N,
    KEYS_FIRST: tl.constexpr, MASK_COLUMN: tl.constexpr, EDGE: tl.constexpr, DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, P_t), or (P,) when neither q nor k has a tangent; (1), (2), (4), (6). `lse` is finite and in base 2."""
    s = _products(q, k, (), (), len(q) * len(k), 0, KEYS_FIRST, PRECISION) * (scale * 1.4426950408889634)
    s = apply_mask(s, mask, rows, columns, M, N, MASK_COLUMN, EDGE, DIAGONAL)
    p = tl.exp2(s - lse)
    if len(q_t) + len(k_t) == 0:
        return (p,)
    else:
        s_t = _products(q_t, k, q, k_t, len(q_t) * len(k), len(q) * len(k_t), KEYS_FIRST, PRECISION) * scale
        return (p, p * (s_t - mu))


@triton.jit
def score_gradients(p, v, v_t, G, T, row_a, row_delta, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """(dS, dS_t), or (dS,) without a cotangent of o_t; (9), (10), (13), (14). `p` is what `probabilities` returns."""
    b = -row_delta
    if len(G) + len(T) * len(v_t) > 0:
        b += _products(G, v, T, v_t, len(G) * len(v), len(T) * len(v_t), KEYS_FIRST, PRECISION)
    ds = p[0] * b
    if len(T) == 0:
        return (ds,)
    else:
        centred = _products(T, v, (), (), len(T) * len(v), 0, KEYS_FIRST, PRECISION) - row_a
        if len(p) > 1:
            ds += p[1] * centred
        return (ds, p[0] * centred)


@triton.jit
def load_row_statistics(lse, mu, row_a, row_delta, base, rows, M):
    """lse in base 2 and the others. P of a row beyond M becomes zero, lse of a row with no allowed key finite."""
    inside = rows < M
    lse2 = tl.load(lse + base + rows, mask=inside, other=float("inf")) * 1.4426950408889634
    lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
    delta = tl.load(row_delta + base + rows, mask=inside, other=0.0)
    mean = delta
    if mu is not None:
        mean = tl.load(mu + base + rows, mask=inside, other=0.0)
    a = delta
    if row_a is not None:
        a = tl.load(row_a + base + rows, mask=inside, other=0.0)
    return lse2, mean, a, delta
