"""q, k and v by head from the packed projection, with the RMS norm of q and k, fused where kernels apply.

v stays a view of the projection. The backward pass writes the gradient of the projection at once, so that no parts of
it are put together.
"""

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dual
from ..dual import Dual, Maybe
from .applies import applies
from .heads_operators import heads, heads_backward
from .library import differentiable


def split_heads(qkv: Dual, count: int) -> tuple[Dual, Dual, Dual]:
    """Views [B, N, 3 width] as q, k and v [B, heads, N, head_dim]."""
    parts = qkv.map(lambda part: part.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4))
    q, k, v = (parts.map(itemgetter(i)) for i in range(3))
    return q, k, v


def normalised_heads(
    qkv: Dual, count: int, q_weight: Tensor, k_weight: Tensor, *, eps: float, detach: bool
) -> tuple[Dual, Dual, Dual]:
    """`split_heads` with q and k RMS-normalised in float32 or wider, in the dtype of the projection.

    detach: no gradient flows through tangents.
    """
    if applies([*qkv, q_weight, k_weight]):
        results = _heads(count, eps, detach, *qkv, q_weight, k_weight)
        q, k, v = (Dual(*results[i::3]).map(lambda part: part.transpose(1, 2)) for i in range(3))
        return q, k, v
    q, k, v = split_heads(qkv, count)
    q, k = (
        dual.rms_norm(part, weight, eps=eps).map(lambda each: each.to(v.value.dtype))
        for part, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k, v


class _Heads(torch.autograd.Function):
    """q, k, v, and then their tangents, if there are some: [B, N, heads, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any, count: int, eps: float, detach: bool, qkv: Tensor, qkv_t: Maybe, q_weight: Tensor, k_weight: Tensor
    ) -> tuple[Tensor, ...]:
        normalised = heads(qkv, qkv_t, q_weight, k_weight, count, eps)
        results = []
        for number, packed in enumerate((qkv,) if qkv_t is None else (qkv, qkv_t)):
            each = 1 if qkv_t is None else 2
            results += normalised[number::each]
            results.append(packed.unflatten(-1, (3, count, -1))[:, :, 2])
        ctx.count, ctx.eps, ctx.detach = count, eps, detach or qkv_t is None
        if detach and qkv_t is not None:
            ctx.mark_non_differentiable(*results[3:])
            qkv_t = None
        ctx.save_for_backward(qkv, qkv_t, q_weight, k_weight)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        qkv, qkv_t, q_weight, k_weight = ctx.saved_tensors
        values, tangents = grads[:3], grads[3:]
        if ctx.detach or all(grad is None for grad in tangents):
            qkv_t, tangents = None, ()
        whole = next(grad for grad in grads if grad is not None)
        dq, dk, dv = (torch.zeros_like(whole) if grad is None else grad for grad in values)
        of_tangents = [torch.zeros_like(whole) if grad is None else grad for grad in tangents]
        dq_t, dk_t, dv_t = of_tangents or (None, None, None)
        *found, sums = heads_backward(qkv, qkv_t, q_weight, k_weight, dq, dq_t, dk, dk_t, dv, dv_t, ctx.count, ctx.eps)
        dqkv, dqkv_t = found if tangents else (*found, None)
        of_q, of_k = sums.sum(1).unbind()
        return None, None, None, dqkv, dqkv_t, of_q.to(q_weight.dtype), of_k.to(k_weight.dtype)


_HINTS = {
    "count": int, "eps": float, "detach": bool, "qkv": Tensor, "qkv_t": Maybe, "q_weight": Tensor, "k_weight": Tensor
}  # fmt: skip
_heads = differentiable("differentiable_heads", _HINTS, _Heads)
