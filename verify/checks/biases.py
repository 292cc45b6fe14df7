"""Learned biases: gradients and tangents of additive masks, against the same call with the bias in extra columns.

With c a power of two, q' = [q, I / c] and k' = [k, bias.T] give the scores c * q @ k.T + bias. So attention of q', k'
and v without a mask has the same results, and the gradients of the extra columns of k' and of its tangent are those of
the bias and of its tangent.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..budget import tolerance
from ..budget.rounding import rounding_bounds
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Results, Subject
from ..oracles.identities import multiples


def learned_biases(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Outputs and gradients of a call whose bias has a tangent are those of the call with extra columns."""
    if inputs.q.numel() == 0:
        return []
    heads = inputs.q.shape[-3] // inputs.k.shape[-3]
    k, v = (x.repeat_interleave(heads, dim=-3) for x in (inputs.k, inputs.v))
    scale = math.copysign(2.0 ** round(math.log2(abs(inputs.c))), inputs.c)
    zeros = {"q_t": torch.zeros_like(inputs.q), "k_t": torch.zeros_like(k), "v_t": torch.zeros_like(v)}
    tangents: dict[str, Any] = {
        name: zero if x is None else x.repeat_interleave(zero.shape[-3] // x.shape[-3], dim=-3)
        for (name, zero), x in zip(zeros.items(), (inputs.q_t, inputs.k_t, inputs.v_t), strict=True)
    }
    cotangent = torch.ones_like(inputs.q[..., :1]) * v[..., :1, :]
    d_o_t = cotangent if inputs.d_o_t is None else inputs.d_o_t
    call = replace(inputs, k=k, v=v, mask=None, scale=scale, **tangents, d_o_t=d_o_t)
    m, n = call.q.shape[-2], k.shape[-2]
    generator = torch.Generator().manual_seed(m * n)
    shape = (*call.q.shape[:-1], n)
    bias, bias_t = (multiples(torch.randn(shape, generator=generator).clamp(-4, 4), 1 / 8).to(call.q) for _ in range(2))
    columns = torch.eye(m, dtype=call.q.dtype, device=call.q.device).expand(*call.q.shape[:-1], m) / scale
    wide = replace(
        call,
        q=torch.cat((call.q, columns), -1),
        k=torch.cat((k, bias.mT), -1),
        q_t=torch.cat((tangents["q_t"], torch.zeros_like(columns)), -1),
        k_t=torch.cat((tangents["k_t"], bias_t.mT), -1),
    )
    expected = subject.results(wide)
    found = _with_bias(call, bias, bias_t, expected, subject)
    return tolerance.same_results(found, expected, wide, wide)


def _with_bias(call: Inputs, bias: Tensor, bias_t: Tensor, wide: Results, subject: Subject) -> Results:
    """Results of a call with a bias and its tangent, with their gradients as columns of those of k and its tangent."""
    assert call.q_t is not None and call.k_t is not None and call.v_t is not None and wide.d_q_t is not None
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v, bias)]
    tangents = [x.detach().requires_grad_() for x in (call.q_t, call.k_t, call.v_t, bias_t)]

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return subject.attention(replace(call, mask=mask))(q, k, v)

    o, o_t = torch.func.jvp(attention, tuple(leaves), tuple(tangents))[:2]
    pairs = [(y, d) for y, d in ((o, call.d_o), (o_t, call.d_o_t)) if d is not None]
    d_q, d_k, d_v, d_bias, d_q_t, d_k_t, d_v_t, d_bias_t = torch.autograd.grad(
        [y for y, _ in pairs], (*leaves, *tangents), [d for _, d in pairs], allow_unused=True, materialize_grads=True
    )
    width = d_q.shape[-1]
    return Results(
        o.detach(), o_t.detach(),
        d_q=torch.cat((d_q, wide.d_q[..., width:]), -1),
        d_k=torch.cat((d_k, d_bias.mT), -1),
        d_v=d_v,
        d_q_t=torch.cat((d_q_t, wide.d_q_t[..., width:]), -1),
        d_k_t=torch.cat((d_k_t, d_bias_t.mT), -1),
        d_v_t=d_v_t,
    )  # fmt: skip


def broadcast_biases(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The gradient of a broadcast bias is the sum of that of the bias written out, over what it is broadcast in."""
    if inputs.q.numel() == 0:
        return []
    d_o = torch.ones_like(inputs.q[..., :1]) * inputs.v[..., :1, :1] if inputs.d_o is None else inputs.d_o
    call = replace(inputs, mask=None, d_o=d_o.expand(*inputs.q.shape[:-1], inputs.v.shape[-1]))
    *batch, heads, m, _ = call.q.shape
    n = call.k.shape[-2]
    full = (*batch, heads, m, n)
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    bounds = rounding_bounds(replace(call, d_o_t=None))["d_k"].whole
    found = []
    for shape in ((heads, m, n), (heads, 1, n), (heads, m, 1), (m, n), (1,)):
        generator = torch.Generator().manual_seed(m * n)
        bias = torch.randn(shape, generator=generator, dtype=dtype).to(call.q.device)
        sums = math.prod(full) // bias.numel()
        few, many = (_gradient(x, call, subject) for x in (bias, bias.expand(full)))
        many = many.double().sum_to_size(shape)
        found.append(tolerance.same(f"d_mask {list(shape)}", few.double(), many, bounds * (1 + sums)))
    return found


def _gradient(mask: Tensor, call: Inputs, subject: Subject) -> Tensor:
    mask = mask.detach().clone().requires_grad_()
    o = subject.attention(replace(call, mask=mask))(call.q, call.k, call.v)
    (grad,) = torch.autograd.grad(o, mask, call.d_o)
    return grad
