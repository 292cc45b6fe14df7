"""The hidden layer of an MLP, fused where kernels apply: GELU, and in its backward pass the sum that the bias gets."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import dual
from ..dual import Dual, Maybe
from .applies import applies
from .gelu_operators import gelu, gelu_backward
from .library import differentiable


def hidden_layer(x: Dual, layer: nn.Linear, *, detach: bool) -> Dual:
    """gelu(layer(x)). detach: no gradient flows through tangents."""
    if applies([*x, *layer.parameters()]):
        # The bias gets its gradient from the kernel, which adds it up on the way.
        h = dual.linear(x, layer.weight, layer.bias.detach())
        return Dual(*_gelu(detach, *h, layer.bias))
    return dual.gelu(dual.linear(x, layer.weight, layer.bias))


class _Gelu(torch.autograd.Function):
    """y, and y_t if there is a tangent. h has the bias in it, but detached: its gradient is given here."""

    @staticmethod
    def forward(ctx: Any, detach: bool, h: Tensor, h_t: Maybe, bias: Tensor) -> tuple[Tensor, ...]:
        results = gelu(h, h_t)
        ctx.dtype, ctx.detach = bias.dtype, detach or h_t is None
        if detach and h_t is not None:
            ctx.mark_non_differentiable(results[1])
            h_t = None
        ctx.save_for_backward(h, h_t)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Maybe, dy_t: Maybe = None) -> tuple[Maybe, ...]:
        h, h_t = ctx.saved_tensors
        if ctx.detach or dy_t is None:
            h_t = dy_t = None
        dy = torch.zeros_like(h) if dy is None else dy
        *found, sums = gelu_backward(h, h_t, dy, dy_t)
        dh, dh_t = found if h_t is not None else (*found, None)
        return None, dh, dh_t, sums.sum(0).to(ctx.dtype)


_gelu = differentiable("differentiable_gelu", {"detach": bool, "h": Tensor, "h_t": Maybe, "bias": Tensor}, _Gelu)
