"""The oracles of attention, and the backend that is judged by them.

`dense64` is dense attention in float64, `dense_same_type` PyTorch's own in the type of the inputs. They share nothing
with flashjvp. `Subject` is the backend, called in each way that flashjvp can be called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashjvp
from flashjvp.dispatch.schema import FORWARD_JVP
from flashjvp.operands import Operands, Options

from ..cases.inputs import Inputs, group_of

Backend = Literal["triton", "tiled", "reference"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Results:
    """Outputs and gradients of one call; None where the tangent (or, of o_t, every tangent) is absent."""

    o: Tensor
    o_t: Tensor | None
    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    d_q_t: Tensor | None
    d_k_t: Tensor | None
    d_v_t: Tensor | None

    def group(self, batch: tuple[int, ...], kv_head: int) -> "Results":
        """The part that belongs to `Inputs.group(batch, kv_head)`."""
        heads = self.d_q.shape[-3] // self.d_k.shape[-3]
        present = {name: x for name in NAMES if (x := getattr(self, name)) is not None}
        parts: dict[str, Any] = {
            name: group_of(x, batch, kv_head, heads if name in QUERY_SIDE else 1) for name, x in present.items()
        }
        return replace(self, **parts)


class Forward(NamedTuple):
    """What a forward pass gives: o, o_t [*batch, Hq, M, Dv] and the statistics lse (natural), mu [*batch, Hq, M]."""

    o: Tensor
    o_t: Tensor
    lse: Tensor
    mu: Tensor


@dataclass(frozen=True)
class Subject:
    """What is verified: a backend of flashjvp, in each way of calling it. Tests put a wrong one in its place."""

    backend: Backend | None = None

    def results(self, inputs: Inputs) -> Results:
        """Outputs and gradients, with explicit tangents."""
        return run(inputs, self.backend)

    def attention(self, inputs: Inputs) -> Attention:
        """Plain attention as a function of q, k, v that torch may differentiate in both modes."""

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            gqa = q.shape[-3] != k.shape[-3]
            mask, is_causal, scale = inputs.mask, inputs.is_causal, inputs.scale
            return flashjvp.attention(q, k, v, mask, 0.0, is_causal, scale, gqa, backend=self.backend)

        return attention

    def forward(self, inputs: Inputs) -> Forward:
        """The outputs with their row statistics."""
        mask = inputs.mask
        if mask is not None:
            mask = mask[(None,) * (inputs.q.ndim - mask.ndim)]
        q, k, v, q_t, k_t, v_t = operands(inputs)
        o, o_t, lse, mu = FORWARD_JVP.handle(
            *Operands(q, k, v, q_t, k_t, v_t, mask), *Options(inputs.is_causal, inputs.scale, self.backend)
        )
        return Forward(o, o_t, lse if lse.ndim == mu.ndim else lse.sum(-1), mu)  # with an additive mask m and log(l)


NAMES = tuple(field.name for field in fields(Results))
QUERY_SIDE = ("o", "o_t", "d_q", "d_q_t")


def dense64(inputs: Inputs) -> Results:
    """Float64 attention written out, differentiated by torch.func.jvp and torch.autograd.grad: the truth."""
    inputs = inputs.map(lambda x: x if x.dtype == torch.bool else x.to(torch.float64))
    heads = inputs.q.shape[-3] // inputs.k.shape[-3]
    keep = allowed(inputs)
    bias = None if inputs.mask is None or inputs.mask.dtype == torch.bool else inputs.mask.masked_fill(~keep, 0.0)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(heads, dim=-3), v.repeat_interleave(heads, dim=-3)
        S = inputs.c * (q @ k.mT)
        S = (S if bias is None else S + bias).masked_fill(~keep, -torch.inf)
        top = S.detach().amax(-1, keepdim=True) if S.shape[-1] else S.new_zeros(*S.shape[:-1], 1)
        p = torch.exp(S - top.masked_fill(top.isneginf(), 0.0))
        total = p.sum(-1, keepdim=True)
        return (p / total.masked_fill(total == 0, 1.0)) @ v

    return differentiate(attention, inputs)


def with_rounded_scores(inputs: Inputs) -> Inputs:
    """A call whose exact results are those of dense attention with scores rounded to the type of computation once,
    after the bias was added: S = c q @ k.T + mask in that type, and everything from there on in float64.

    That is float32 for the half types. The largest score of each row, which changes nothing, is taken off S, and keys
    without weight in float64 take no part: what is left is of a size that float64 keeps digits of.
    """
    assert inputs.mask is not None
    q, k = inputs.q.double(), inputs.k.double().repeat_interleave(inputs.q.shape[-3] // inputs.k.shape[-3], dim=-3)
    products, keep = inputs.c * (q @ k.mT), allowed(inputs)
    computed = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    S = (products.to(computed) + inputs.mask.to(computed)).double().masked_fill(~keep, -torch.inf)
    top = S.amax(-1, keepdim=True)
    S = S - top.masked_fill(top.isneginf(), 0.0)
    return replace(inputs, mask=(S - products).masked_fill(S.exp() == 0, -torch.inf))


def dense_same_type(inputs: Inputs) -> Results:
    """PyTorch's dense attention in the type of the inputs (its math backend computes half types in float32).

    Its gradients through a JVP are NaN where a row has no allowed key, though its outputs are zeros there. So such rows
    attend to every key and their outputs are then replaced by zeros.
    """
    keep = allowed(inputs)
    empty = ~keep.any(-1, keepdim=True)
    mask = inputs.mask
    if mask is None or mask.dtype == torch.bool:
        mask = keep | empty
    else:
        mask = mask.masked_fill(~keep, -torch.inf).masked_fill(empty, 0.0)
    if inputs.q.dtype == torch.float64 and mask.dtype != torch.bool:
        mask = mask.to(torch.float64)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[-3] != k.shape[-3]
        o = scaled_dot_product_attention(q, k, v, mask, scale=inputs.scale, enable_gqa=gqa)
        return o.masked_fill(empty, 0.0)

    with sdpa_kernel(SDPBackend.MATH):
        return differentiate(attention, inputs)


def run(inputs: Inputs, backend: Backend | None = None, **options: Any) -> Results:
    """flashjvp on a backend: attention_jvp, or attention where no input has a tangent, and the gradients of it.

    `options` are those of flashjvp that the inputs have no field for.
    """
    q, k, v, q_t, k_t, v_t = leaves = [x if x is None else x.detach().requires_grad_() for x in operands(inputs)]
    assert q is not None and k is not None and v is not None
    gqa = q.shape[-3] != k.shape[-3]
    if inputs.has_tangent:
        o, o_t = flashjvp.attention_jvp(
            q, k, v, q_t, k_t, v_t, inputs.mask, inputs.is_causal, inputs.scale, gqa, backend=backend, **options
        )
        return _collect(o, o_t, leaves, inputs)
    o = flashjvp.attention(q, k, v, inputs.mask, 0.0, inputs.is_causal, inputs.scale, gqa, backend=backend, **options)
    return _collect(o, None, leaves, inputs)


def allowed(inputs: Inputs) -> Tensor:
    """Boolean [*batch, Hq, M, N]: which key each query may attend to."""
    shape = (*inputs.q.shape[:-1], inputs.k.shape[-2])
    keep = torch.ones(shape[-2:], dtype=torch.bool, device=inputs.q.device)
    if inputs.is_causal:
        keep = keep.tril()
    if inputs.mask is not None:
        keep = keep & (inputs.mask if inputs.mask.dtype == torch.bool else ~inputs.mask.isneginf())
    return keep.expand(shape)


def operands(inputs: Inputs) -> list[Any]:
    """q, k, v and their tangents, None where absent."""
    return [inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t]


def differentiate(attention: Attention, inputs: Inputs) -> Results:
    """Any attention under torch.func.jvp with the tangents present, then reverse mode through both outputs."""
    leaves = [None if x is None else x.detach().contiguous().requires_grad_() for x in operands(inputs)]
    q, k, v, *tangents = leaves
    assert q is not None and k is not None and v is not None
    if not inputs.has_tangent:
        return _collect(attention(q, k, v), None, leaves, inputs)
    full = tuple(torch.zeros_like(x) if x_t is None else x_t for x, x_t in zip((q, k, v), tangents, strict=True))
    o, o_t = torch.func.jvp(attention, (q, k, v), full)[:2]
    return _collect(o, o_t, leaves, inputs)


def _collect(o: Tensor, o_t: Tensor | None, leaves: Sequence[Tensor | None], inputs: Inputs) -> Results:
    pairs = [(y, d) for y, d in ((o, inputs.d_o), (o_t, inputs.d_o_t)) if y is not None and d is not None]
    present = [x for x in leaves if x is not None]
    outputs, cotangents = [y for y, _ in pairs], [d for _, d in pairs]
    grads = iter(torch.autograd.grad(outputs, present, cotangents, allow_unused=True, materialize_grads=True))
    d_q, d_k, d_v, d_q_t, d_k_t, d_v_t = [None if x is None else next(grads) for x in leaves]
    assert d_q is not None and d_k is not None and d_v is not None
    return Results(o.detach(), None if o_t is None else o_t.detach(), d_q, d_k, d_v, d_q_t, d_k_t, d_v_t)
