"""Attention by its equations, in memory O(M N), for what flashjvp refuses and a user allows to be dense."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import causal_bias


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """softmax(c q k^T + bias) v with dropout, of ordinary operations that have every derivative.

    Zeros for a query that may see no key.
    """
    p = weights(q, k, attn_mask, is_causal, scale, enable_gqa)
    return F.dropout(p, dropout_p) @ _for_each_query_head(v, q, enable_gqa)


def weights(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """P = softmax(c q k^T + bias), [..., Hq, M, N]; zeros in the row of a query that may see no key."""
    if attn_mask is not None and type(attn_mask) is not Tensor and causal_bias.is_causal_bias(attn_mask):
        attn_mask, is_causal = causal_bias.meaning(attn_mask, q, k)
    k = _for_each_query_head(k, q, enable_gqa)
    s = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else s + attn_mask
    if not is_causal and attn_mask is None:
        return _softmax(s)
    sees_none = (s == -torch.inf).all(-1, keepdim=True)
    return _softmax(s.masked_fill(sees_none, 0.0)).masked_fill(sees_none, 0.0)


def _softmax(s: Tensor) -> Tensor:
    """softmax over the last dim. PyTorch's own, in a dual level, changes in place what its backward pass needs."""
    if s.shape[-1] == 0:
        return s
    exact = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s
    exponentials = (exact - exact.detach().amax(-1, keepdim=True)).exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)).to(s.dtype)


def _for_each_query_head(x: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if enable_gqa else x
