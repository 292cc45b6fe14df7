"""What the two backward kernels recompute for one tile of queries and keys, in either orientation; MATH.md (1)-(14).

With KEYS_FIRST a tile is [keys, queries], so that products over queries take it as their left operand from registers;
otherwise it is [queries, keys]. Row statistics come shaped to broadcast to the tile.
"""

import triton
import triton.language as tl

from ..tiles import biased_scores, scores_and_tangent, scores_sum
from .bias_tangent import load_mask_tangent
from .dropout import dropped
from .visible import hide


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
    """query @ key.T + query2 @ key2.T, transposed if KEYS_FIRST, without a product that lacks an operand."""
    if KEYS_FIRST:
        return scores_sum(key, query, key2, query2, FIRST, SECOND, PRECISION)
    else:
        return scores_sum(query, key, query2, key2, FIRST, SECOND, PRECISION)


@triton.jit
def _products_and_tangent(
    query, key, query_t, key_t, FIRST: tl.constexpr, SECOND: tl.constexpr, KEYS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """query @ key.T and query_t @ key.T + query @ key_t.T, transposed if KEYS_FIRST."""
    if KEYS_FIRST:
        return scores_and_tangent(key, query, key_t, query_t, SECOND, FIRST, PRECISION)
    else:
        return scores_and_tangent(query, key, query_t, key_t, FIRST, SECOND, PRECISION)


@triton.jit
def load_statistic(x, first, rows, inside):
    """A row statistic, shaped [*batch, heads, M], at `first + rows`; an empty tuple where it is missing."""
    if x is None:
        return ()
    else:
        return tl.load(x + first + rows, mask=inside, other=0.0)


@triton.jit
def load_lse(x, first, rows, inside, ADDITIVE: tl.constexpr):
    """lse as the forward pass wrote it: a number a row, or with an additive mask two (layout.empty_lse)."""
    if ADDITIVE:
        return tl.load(x + first * 2 + rows * 2, mask=inside, other=0.0), tl.load(
            x + first * 2 + rows * 2 + 1, mask=inside, other=0.0
        )
    else:
        return load_statistic(x, first, rows, inside)


@triton.jit
def _statistic(x, KEYS_FIRST: tl.constexpr):
    """A statistic shaped to broadcast to the tile.

    With KEYS_FIRST `x` holds the arguments of load_statistic and is loaded only here: a thread holds many of the tile's
    queries, so that four statistics that wait for their use would not fit the registers.
    """
    if KEYS_FIRST:
        pointer, first, rows, inside = x
        return load_statistic(pointer, first, rows, inside)[None, :]
    else:
        return x[:, None]


@triton.jit
def _exponents(s, lse, KEYS_FIRST: tl.constexpr):
    """S - lse in base 2 of scores with an additive mask: the largest score of a row is subtracted first. It is finite
    here also in a row with no allowed key, whose scores are -inf."""
    LEAST: tl.constexpr = -3.4028234663852886e38
    if KEYS_FIRST:  # one after the other, as registers are short
        pointer, first, rows, inside = lse
        m = tl.load(pointer + first * 2 + rows * 2, mask=inside, other=0.0)
        s = (s - tl.maximum(m, LEAST)[None, :]) * 1.4426950408889634
        log_l = tl.load(pointer + first * 2 + rows * 2 + 1, mask=inside, other=0.0)
        return s - (log_l * 1.4426950408889634)[None, :]
    else:
        m, log_l = lse
        s = (s - tl.maximum(m, LEAST)[:, None]) * 1.4426950408889634  # mutate: s (1)
        return s - (log_l * 1.4426950408889634)[:, None]


@triton.jit
def probabilities(
    q, k, q_t, k_t, lse, mu, mask, mask_t, scale, m0, n0, row, column, M, N, at_border, only,
    KEYS_FIRST: tl.constexpr, MASK_LAYOUT: tl.constexpr, EDGE: tl.constexpr, DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, P_t), or (P,) when none of q, k and the mask has a tangent; (1), (2), (24), (6)."""
    FIRST: tl.constexpr = len(q_t) * len(k)  # mutate: FIRST
    SECOND: tl.constexpr = len(q) * len(k_t)
    JOINT: tl.constexpr = q[0].dtype == tl.float32 and PRECISION == "ieee"
    if JOINT:
        s, s_t = _products_and_tangent(q, k, q_t, k_t, FIRST, SECOND, KEYS_FIRST, PRECISION)
    else:
        s = _products(q, k, (), (), len(q) * len(k), 0, KEYS_FIRST, PRECISION)
    ADDITIVE: tl.constexpr = MASK_LAYOUT[2]
    # mutate: s (2)
    s = biased_scores(s, scale, mask, m0, n0, row, column, M, N, at_border, MASK_LAYOUT, EDGE, DIAGONAL)
    s = hide(s, only, m0, n0, row, column, at_border)
    if ADDITIVE:
        p = tl.exp2(_exponents(s, lse, KEYS_FIRST))
    else:
        lse2 = _statistic(lse, KEYS_FIRST) * 1.4426950408889634
        if MASK_LAYOUT[3]:
            lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)  # mutate: lse2
        p = tl.exp2(s - lse2)
    if FIRST + SECOND + len(mask_t) == 0:
        return (p,)
    elif FIRST + SECOND == 0:
        bias_t = load_mask_tangent(mask_t, m0, n0, row, column, M, N, MASK_LAYOUT)
        return (p, p * (bias_t - _statistic(mu, KEYS_FIRST)))
    else:
        if not JOINT:
            s_t = _products(q_t, k, q, k_t, FIRST, SECOND, KEYS_FIRST, PRECISION)
        if len(mask_t) > 0:
            bias_t = load_mask_tangent(mask_t, m0, n0, row, column, M, N, MASK_LAYOUT)
            return (p, p * (s_t * scale + bias_t - _statistic(mu, KEYS_FIRST)))  # mutate: return p bias_t
        return (p, p * (s_t * scale - _statistic(mu, KEYS_FIRST)))  # mutate: return p p


@triton.jit
def score_gradients(p, v, v_t, G, T, row_a, row_delta, kept, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """(dS, dS_t), or (dS,) without a cotangent of o_t; (13), (14), (29), (30).

    `p` is what `probabilities` returns, `kept` what `kept_tile` does.
    """
    FIRST: tl.constexpr = len(G) * len(v)
    SECOND: tl.constexpr = len(T) * len(v_t)  # mutate: SECOND
    centred = ()
    b = 0.0
    if len(T) > 0 and v[0].dtype == tl.float32 and PRECISION == "ieee":
        centred, b = _products_and_tangent(T, v, G, v_t, FIRST, SECOND, KEYS_FIRST, PRECISION)
    else:
        if len(T) > 0:
            centred = _products(T, v, (), (), len(T) * len(v), 0, KEYS_FIRST, PRECISION)
        if FIRST + SECOND > 0:
            b = _products(G, v, T, v_t, FIRST, SECOND, KEYS_FIRST, PRECISION)
    if len(kept) > 0:
        b = dropped(b, kept)  # mutate: b
        if len(T) > 0:
            centred = dropped(centred, kept)
    ds = p[0] * (b - _statistic(row_delta, KEYS_FIRST))  # mutate: ds (1)
    if len(T) == 0:
        return (ds,)
    else:
        centred -= _statistic(row_a, KEYS_FIRST)  # mutate: centred
        if len(p) > 1:
            ds += p[1] * centred  # mutate: ds (2)
        return (ds, p[0] * centred)
