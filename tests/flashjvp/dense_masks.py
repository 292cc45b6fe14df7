"""Dense attention of the keys that a boolean mask keeps, written out, for what means such a mask."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.testing import assert_close

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def kept(keep: Tensor, bias: Tensor | None = None) -> Attention:
    """Attention of q, k, v in float64, whose key heads are repeated. A query without a key gets zeros."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(heads, -3), v.repeat_interleave(heads, -3)
        S = q.shape[-1] ** -0.5 * q @ k.mT
        P = torch.exp(S if bias is None else S + bias) * keep
        return P @ v / P.sum(-1, keepdim=True).clamp(min=1e-300)

    return attention


def assert_same(found: Attention, expected: Attention, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> None:
    """o and o_t of float64 tensors are the same, and so are all gradients of both."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, *tangents)]
    results = [torch.func.jvp(call, tuple(leaves[:3]), tuple(leaves[3:])) for call in (found, expected)]
    assert_close(*results)
    assert_close(*[torch.autograd.grad((o.sin() + o_t.cos()).sum(), leaves) for o, o_t in results])
