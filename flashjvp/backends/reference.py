"""Dense attention, its JVP and the backward of both, written as the equations of kernels/MATH.md: the oracle.

Needs O(M N) memory. Every function takes tensors of equal rank, q [..., Hq, M, D], k [..., Hkv, N, D] and
v [..., Hkv, N, Dv] with Hq a multiple of Hkv, and a mask of the same rank that broadcasts to [..., Hq, M, N] (boolean,
True = take part, or additive), any float type, any device. The tangent of an additive mask has its shape. Half types
are computed in float32, the others in their own type. `lse` is log(sum(exp(S))) of each row, or with an additive mask
the two numbers of `layout.empty_lse`.
"""

from typing import Any

import torch
from torch import Tensor

from ..layout import STATISTIC_DTYPE, empty_bias, is_additive, rows
from . import philox
from .patterns import Pattern

Maybe = Tensor | None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Maybe, seed: Maybe, is_causal: bool, scale: float, dropout_p: float,
    pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse; MATH.md (1)-(3), (27)."""
    o, _, lse, _ = forward_jvp(q, k, v, None, None, None, mask, None, seed, is_causal, scale, dropout_p, pattern)
    return o, lse


def forward_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, mask_t: Maybe, seed: Maybe,
    is_causal: bool, scale: float, dropout_p: float, pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, o_t, lse and mu; MATH.md (1)-(7), (24), (27), (28)."""
    heads = q.shape[-3]
    q_, k_, v_, q_t_, k_t_, v_t_ = _widen(heads, q, k, v, q_t, k_t, v_t)
    P, lse = _softmax(_scores(q_, k_, mask, is_causal, scale, pattern), is_additive(mask))
    S_t = _score_tangent(q_, k_, q_t_, k_t_, mask_t, scale, P)
    mu = (P * S_t).sum(-1)  # (5)
    P_t = P * (S_t - mu[..., None])  # (6)
    R = _dropout(seed, P, dropout_p)
    o = (R * P) @ v_  # (3), (27)
    o_t = (R * P_t) @ v_ + _product(R * P, v_t_)  # (7), (28)
    return rows(o, q), rows(o_t, q), lse, mu


def backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Maybe, seed: Maybe, is_causal: bool,
    scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool], pattern: Pattern | None = None,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_mask; MATH.md (9)-(17), (25) with no tangent."""
    mu = q.new_zeros(q.shape[:-1], dtype=lse.dtype)
    of_q, of_k, of_v, of_mask = wanted
    d_q, d_k, d_v, _, _, _, d_mask, _ = backward_jvp(
        d_o, None, q, k, v, None, None, None, o, None, lse, mu, mask, None, seed, is_causal, scale, dropout_p,
        (of_q, of_k, of_v, False, False, False, of_mask, False), pattern,
    )  # fmt: skip
    return d_q, d_k, d_v, d_mask


def backward_jvp(
    d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor, o_t:
    Maybe, lse: Tensor, mu: Tensor, mask: Maybe, mask_t: Maybe, seed: Maybe, is_causal: bool, scale: float,
    dropout_p: float, wanted: tuple[bool, ...], pattern: Pattern | None = None,
) -> tuple[Maybe, ...]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, d_mask, d_mask_t; MATH.md (9)-(20), (25), (29)-(32).

    A missing cotangent is zero.
    """
    heads, kv_heads = q.shape[-3], k.shape[-3]
    q_, k_, v_, q_t_, k_t_, v_t_ = _widen(heads, q, k, v, q_t, k_t, v_t)
    G, T, O, O_t = _widen(heads, d_o, d_o_t, o, o_t)
    P = _probabilities(_scores(q_, k_, mask, is_causal, scale, pattern), lse)
    S_t = _score_tangent(q_, k_, q_t_, k_t_, mask_t, scale, P)
    P_t = P * (S_t - mu[..., None])  # (6)
    R = _dropout(seed, P, dropout_p)
    A = R * _product(T, _transpose(v_), like=P)  # (9), (29)
    B = R * (_product(G, _transpose(v_), like=P) + _product(T, _transpose(v_t_), like=P))  # (10), (30)
    a = _row_product(T, O, like=mu)  # (11)
    delta = _row_product(G, O, like=mu) + _row_product(T, O_t, like=mu)  # (12)
    d_bias_t = P * (A - a[..., None])  # (13), (25)
    d_bias = P_t * (A - a[..., None]) + P * (B - delta[..., None])  # (14), (25)
    dS, dS_t = scale * d_bias, scale * d_bias_t  # times c, as the products of (15), (16), (18), (19) are
    d_q = dS @ k_ + _product(dS_t, k_t_)  # (15)
    d_k = dS.mT @ q_ + _product(dS_t.mT, q_t_)  # (16)
    P, P_t = R * P, R * P_t
    d_v = _product(P.mT, G, like=v_) + _product(P_t.mT, T, like=v_)  # (17), (31)
    d_q_t, d_k_t, d_v_t = dS_t @ k_, dS_t.mT @ q_, _product(P.mT, T, like=v_)  # (18)-(20), (32)
    grads = (d_q, d_k, d_v, d_q_t, d_k_t, d_v_t)
    likes = (q, k, v, q_t, k_t, v_t)
    *wanted_of_inputs, of_mask, of_mask_t = wanted
    return *(
        rows(_sum_groups(grad, kv_heads) if i % 3 else grad, like) if want and like is not None else None
        for i, (grad, like, want) in enumerate(zip(grads, likes, wanted_of_inputs, strict=True))
    ), _of_mask(d_bias, mask, of_mask), _of_mask(d_bias_t, mask_t, of_mask_t)  # fmt: skip


def _widen(heads: int, *tensors: Maybe) -> list[Any]:
    """The tensors in the type of computation, key heads repeated to the number of query heads."""
    return [
        None if x is None else x.to(STATISTIC_DTYPE[x.dtype]).repeat_interleave(heads // max(x.shape[-3], 1), dim=-3)
        for x in tensors
    ]


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """Adds the gradients of the query heads that share a key head."""
    if kv_heads == 0:
        return grad
    return grad.unflatten(-3, (kv_heads, -1)).sum(-3)


def _of_mask(grad: Tensor, mask: Maybe, want: bool) -> Maybe:
    """(25), summed over the dims in which the mask is broadcast."""
    return empty_bias(mask).copy_(grad.sum_to_size(mask.shape)) if want and mask is not None else None


def _dropout(seed: Maybe, P: Tensor, dropout_p: float) -> Any:
    """R of (26); 1 without dropout."""
    if seed is None:
        return 1.0
    return philox.factor(dropout_p) * philox.kept_everywhere(seed, P.shape, dropout_p).to(P.dtype)


def _scores(
    q: Tensor, k: Tensor, mask: Maybe, is_causal: bool, scale: float, pattern: Pattern | None
) -> Tensor:  # fmt: skip
    S = scale * (q @ k.mT)  # (1)
    if pattern is not None:
        seen = pattern.visible(slice(0, S.shape[-2]), slice(0, S.shape[-1]), S.device)  # (33)
        if seen is not None:
            S = S.masked_fill(~(seen if S.ndim > 3 else seen[0]), -torch.inf)
    if is_causal:
        keep = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).tril()
        S = S.masked_fill(~keep, -torch.inf)
    if mask is None:
        return S
    return S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask


def _softmax(S: Tensor, additive: bool) -> tuple[Tensor, Tensor]:
    """P and lse; a row with no allowed key has P = 0 and lse = -inf."""
    P = torch.softmax(S, dim=-1)  # (2)
    if not additive:
        lse = torch.logsumexp(S, dim=-1)
        return P.masked_fill(lse.isneginf()[..., None], 0.0), lse
    m = S.amax(-1) if S.shape[-1] else S.new_full(S.shape[:-1], -torch.inf)
    log_l = torch.logsumexp(S - _finite(m)[..., None], dim=-1)
    # mutate: return P masked_fill
    return P.masked_fill(m.isneginf()[..., None], 0.0), torch.stack((m, log_l), dim=-1)


def _probabilities(S: Tensor, lse: Tensor) -> Tensor:
    """P again: S - lse, or (S - m) - log(l), each from scores that are the same numbers as in the forward pass."""
    if lse.ndim < S.ndim:
        return torch.exp(S - _finite(lse)[..., None])
    m, log_l = _finite(lse).unbind(-1)
    return torch.exp((S - m[..., None]) - log_l[..., None])


def _finite(x: Tensor) -> Tensor:
    """x with 0 for -inf, the statistic of a row without a key."""
    return x.masked_fill(x.isneginf(), 0.0)


def _score_tangent(q: Tensor, k: Tensor, q_t: Maybe, k_t: Maybe, mask_t: Maybe, scale: float, like: Tensor) -> Tensor:
    S_t = scale * (_product(q_t, k.mT, like=like) + _product(q, _transpose(k_t), like=like))  # (4)
    return S_t if mask_t is None else S_t + mask_t  # (24)


def _transpose(x: Maybe) -> Maybe:
    return None if x is None else x.mT


def _product(a: Maybe, b: Maybe, like: Tensor | None = None) -> Any:
    """a @ b, or zero (of the shape of `like` where the sum may have no other term) when a factor is missing."""
    if a is None or b is None:
        return 0.0 if like is None else torch.zeros_like(like)
    return a @ b


def _row_product(a: Maybe, b: Maybe, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if a is None or b is None else (a * b).sum(-1)
