"""The residual stream between the branches of a block: gated residual, norm and modulation, fused where kernels apply.

A half of a block reads the stream once and writes it once, in the forward pass as in the backward pass, where its
kernel adds the gradient that comes along the stream to that of the norm. So `modulated` also returns the stream that it
was given: whoever goes on with that one saves a sum of two gradients.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import dual
from ..dual import Dual, Maybe
from .applies import all_or_none, applies
from .library import differentiable
from .stream_operators import stream, stream_backward

MOST_CHANNELS = 2048  # of a row, of which several are in flight in shared memory: 98 KB, and some cards have 99
NOTHING: tuple[Maybe, Maybe] = (None, None)
Norm = Literal["rms", "layer"]


class Modulation(NamedTuple):
    """Shift and scale of a normalised row, each [B, 1, width]."""

    shift: Dual
    scale: Dual


def modulated(x: Dual, to: Modulation, norm: Norm, *, eps: float, detach: bool) -> tuple[Dual, Dual]:
    """x [B, N, width], and norm(x) (1 + scale) + shift; kernels return this in the type of autocast.

    detach: no gradient flows through tangents.
    """
    if norm == "rms" and _applies(x, None, None, to):
        y, inner = _fused(x, None, None, to, eps, detach)
        assert inner is not None
        return y, inner
    return x, dual.modulate(dual.norm(x, norm, eps=eps), to.shift, to.scale)


def added_and_modulated(
    x: Dual, gate: Dual, branch: Dual, to: Modulation, norm: Norm, *, eps: float, detach: bool
) -> tuple[Dual, Dual]:
    """y = x + gate * branch with a gate [B, 1, width], and y normalised and modulated as by `modulated`."""
    if norm == "rms" and _applies(x, gate, branch, to):
        y, inner = _fused(x, gate, branch, to, eps, detach)
        assert inner is not None
        return y, inner
    return modulated(dual.gated_residual(x, gate, branch), to, norm, eps=eps, detach=detach)


def added(x: Dual, gate: Dual, branch: Dual, *, detach: bool) -> Dual:
    """x + gate * branch with a gate [B, 1, width]."""
    if _applies(x, gate, branch, None):
        return _fused(x, gate, branch, None, 0.0, detach)[0]
    return dual.gated_residual(x, gate, branch)


def _applies(x: Dual, gate: Dual | None, branch: Dual | None, to: Modulation | None) -> bool:
    """Whether the kernels serve these: all have tangents or none has, and shapes are those documented."""
    rows = [row for row in (x, branch) if row is not None]
    vectors = [vector for vector in (gate, *(to or NOTHING)) if vector is not None]
    images, channels = len(x.value), x.value.shape[-1]
    return (
        x.value.dim() == 3
        and (x.value.dtype == torch.float32 or torch.is_autocast_enabled(x.value.device.type))
        and channels <= MOST_CHANNELS
        and all(row.value.shape == x.value.shape for row in rows)
        and all(vector.value.shape == (images, 1, channels) for vector in vectors)
        and all(part is None or part.stride(-1) == 1 for vector in vectors for part in vector)
        and len({vector.value.dtype for vector in vectors}) == 1
        and all_or_none([each.tangent for each in (*rows, *vectors)])
        and applies([part for each in (*rows, *vectors) for part in each])
    )


def _fused(
    x: Dual, gate: Dual | None, branch: Dual | None, to: Modulation | None, eps: float, detach: bool
) -> tuple[Dual, Dual | None]:
    """The stream and, given `to`, the normalised and modulated stream."""
    shift, scale = to or (NOTHING, NOTHING)
    device = x.value.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.value.dtype
    results = _stream(eps, dtype, detach, *x, *(branch or NOTHING), *(gate or NOTHING), *shift, *scale)
    each = 1 if x.tangent is None else 2
    return Dual(*results[:each]), None if to is None else Dual(*results[each:])


class _Stream(torch.autograd.Function):
    """y, y_t, inner, inner_t, those of them that exist. Without a branch y is x."""

    @staticmethod
    def forward(ctx: Any, eps: float, dtype: torch.dtype, detach: bool, *given: Maybe) -> tuple[Tensor, ...]:
        x, x_t, branch, branch_t, gate, gate_t, _, _, scale, scale_t = given
        assert x is not None
        results = stream(*given, eps, dtype)
        if branch is None:
            results = [part.view_as(part) for part in (x, x_t) if part is not None] + results
        ctx.eps, ctx.dtypes, ctx.dual, ctx.detach = eps, (x.dtype, dtype), x_t is not None, detach
        if detach and x_t is not None:
            ctx.mark_non_differentiable(*results[1::2])
            x_t = branch_t = gate_t = scale_t = None
        rows = NOTHING if scale is None else (x, x_t)  # which only norms need
        ctx.save_for_backward(*rows, branch, branch_t, gate, gate_t, scale, scale_t)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        x, x_t, branch, branch_t, gate, gate_t, scale, scale_t = ctx.saved_tensors
        normed, gated = scale is not None, branch is not None
        values, tangents = (grads[::2], grads[1::2]) if ctx.dual else (grads, ())
        if ctx.detach or all(grad is None for grad in tangents):
            x_t = branch_t = gate_t = scale_t = None
            tangents = ()
        dy, dy_t, di, di_t = _all_gradients(values, tangents, ctx.dtypes)
        *found, sums = stream_backward(
            x, x_t, branch, branch_t, gate, gate_t, scale, scale_t, dy, dy_t, di, di_t, ctx.eps
        )
        each = 2 if tangents else 1
        dx = _pair(found[:each]) if normed else (dy, dy_t)
        db = _pair(found[-each:]) if gated else NOTHING
        d_gate = d_shift = d_scale = NOTHING
        vectors = sums.sum(1).to((scale if gate is None else gate).dtype).unsqueeze(2).unbind(1)
        kinds = len(vectors) // each
        if gated:
            d_gate = _pair(vectors[kinds - 1 :: kinds])
        if normed:
            d_shift, d_scale = _pair(vectors[::kinds]), _pair(vectors[1::kinds])
        return None, None, None, *dx, *db, *d_gate, *d_shift, *d_scale


def _all_gradients(
    values: Sequence[Maybe], tangents: Sequence[Maybe], dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Maybe, Maybe, Maybe]:
    """dy, dy_t, di, di_t, with zeros for those that did not come. dtypes: of y and of the normalised rows."""
    some = next(grad for grad in (*values, *tangents) if grad is not None)
    values, tangents = (
        [torch.zeros_like(some, dtype=d) if g is None else g for g, d in zip(kind, dtypes, strict=False)]
        for kind in (values, tangents)
    )
    (dy, di), (dy_t, di_t) = _pair(values), _pair(tangents)
    assert dy is not None
    return dy, dy_t, di, di_t


def _pair(found: Sequence[Maybe]) -> tuple[Maybe, Maybe]:
    """What is there of two, and None for the rest."""
    first, second = (*found, None, None)[:2]
    return first, second


_ROWS = ("x", "x_t", "branch", "branch_t", "gate", "gate_t", "shift", "shift_t", "scale", "scale_t")
_HINTS = {"eps": float, "dtype": torch.dtype, "detach": bool} | dict.fromkeys(_ROWS, Maybe)
_stream = differentiable("differentiable_stream", _HINTS, _Stream)
