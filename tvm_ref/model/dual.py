"""Layers on pairs (value, tangent): a function and its Jacobian-vector product in closed form.

A `Dual` is a value and its tangent, which has the value's shape and dtype, or None where the tangent is zero; a zero
tangent costs nothing. Every function returns a Dual whose tangent is None exactly if no argument has one. With y = f(x)
the tangent is y_t = f'(x) x_t. Parameters have no tangent. All are differentiable in reverse mode through value and
tangent together, once, and without tangents also under `torch.func.jvp`.

Norms are computed, and returned, in float32 at least, whatever the autocast mode. `F.layer_norm` is not used: its JVP
has a silently wrong gradient (PyTorch 2.13), while the same formula written out is right.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import flashjvp

if TYPE_CHECKING:
    from flashjvp.distributed import Sharding

Maybe = Tensor | None


class Linear(Protocol):
    """`F.linear`, or what takes its place (float8.py)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Maybe = None, /) -> Tensor: ...


class Dual(NamedTuple):
    """A value and its tangent, of the same shape and dtype; None is the zero tangent."""

    value: Tensor
    tangent: Maybe = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Dual":
        """A linear function (a view, a cast) of value and tangent alike."""
        return Dual(function(self.value), None if self.tangent is None else function(self.tangent))

    def detach_tangent(self) -> "Dual":
        """The same numbers; no gradient flows through the tangent."""
        return Dual(self.value, None if self.tangent is None else self.tangent.detach())


def total(*terms: Maybe) -> Maybe:
    """The sum of the terms that exist; None if none does."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def add(x: Dual, y: Dual) -> Dual:
    """x + y."""
    return Dual(x.value + y.value, total(x.tangent, y.tangent))


def linear(x: Dual, weight: Tensor, bias: Maybe = None, product: Linear = F.linear) -> Dual:
    """x @ weight.T + bias for x [..., in], weight [out, in], bias [out]; y_t = x_t @ weight.T."""
    tangent = None if x.tangent is None else product(x.tangent, weight)
    return Dual(product(x.value, weight, bias), tangent)


def rms_norm(x: Dual, weight: Maybe = None, *, eps: float) -> Dual:
    """x / rms * weight, rms = sqrt(mean(x^2) + eps) over the last dim; Zhang & Sennrich, arXiv 1910.07467.

    With y = x / rms: y_t = (x_t - y mean(y x_t)) / rms.
    """
    value, x_t = x.map(_wide)
    inverse_rms = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    y = value * inverse_rms
    y_t = None if x_t is None else (x_t - y * (y * x_t).mean(-1, keepdim=True)) * inverse_rms
    return Dual(y, y_t) if weight is None else Dual(y, y_t).map(lambda part: part * weight)


def layer_norm(x: Dual, *, eps: float) -> Dual:
    """(x - mean) / sqrt(var + eps) over the last dim, var = mean((x - mean)^2), without parameters."""
    return rms_norm(x.map(_wide).map(_centred), eps=eps)


def norm(x: Dual, kind: Literal["rms", "layer"], *, eps: float) -> Dual:
    """`rms_norm` or `layer_norm`, without parameters."""
    return rms_norm(x, eps=eps) if kind == "rms" else layer_norm(x, eps=eps)


def modulate(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """x (1 + scale) + shift, elementwise with broadcasting; Peebles & Xie, arXiv 2212.09748."""
    gain = 1 + scale.value
    tangent = total(_product(x.tangent, gain), _product(scale.tangent, x.value), shift.tangent)
    value = x.value * gain + shift.value
    return Dual(value, None if tangent is None else tangent.expand(value.shape))


def gated_residual(x: Dual, gate: Dual, branch: Dual) -> Dual:
    """x + gate * branch, elementwise with broadcasting, rounded to the type of x."""
    tangent = total(x.tangent, _product(gate.tangent, branch.value), _product(branch.tangent, gate.value))
    return Dual(x.value + gate.value * branch.value, tangent).map(lambda part: part.to(x.value.dtype))


def silu(x: Dual) -> Dual:
    """x sigmoid(x), y_t = sigmoid(x) (1 + x (1 - sigmoid(x))) x_t."""
    if x.tangent is None:
        return Dual(F.silu(x.value))
    sigmoid = torch.sigmoid(x.value)
    return Dual(F.silu(x.value), sigmoid * (1 + x.value * (1 - sigmoid)) * x.tangent)


def gelu(x: Dual) -> Dual:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; Hendrycks & Gimpel, arXiv 1606.08415.

    The derivative is elementwise, so x_t times it is what the backward pass computes of a cotangent x_t.
    """
    value = F.gelu(x.value, approximate="tanh")
    if x.tangent is None:
        return Dual(value)
    return Dual(value, torch.ops.aten.gelu_backward(x.tangent, x.value, approximate="tanh"))


def attention(q: Dual, k: Dual, v: Dual, *, backend: str | None, sharding: "Sharding | None" = None) -> Dual:
    """softmax(q k^T / sqrt(D)) v for q, k, v [..., heads, tokens, D]; tangents as in `flashjvp.attention_jvp`.

    sharding: how tokens are divided over processes, where those of an image are.
    """
    if sharding is not None:
        return _attention_over_processes(q, k, v, backend, sharding)
    if q.tangent is None and k.tangent is None and v.tangent is None:
        return Dual(flashjvp.attention(q.value, k.value, v.value, backend=backend))
    return Dual(*flashjvp.attention_jvp(q.value, k.value, v.value, q.tangent, k.tangent, v.tangent, backend=backend))


def _attention_over_processes(q: Dual, k: Dual, v: Dual, backend: str | None, sharding: "Sharding") -> Dual:
    from flashjvp import distributed

    values, tangents = (q.value, k.value, v.value), (q.tangent, k.tangent, v.tangent)
    if all(tangent is None for tangent in tangents):
        return Dual(distributed.attention(*values, sharding, backend=backend))
    return Dual(*distributed.attention_jvp(*values, *tangents, sharding, backend=backend))


def sinusoids(time: Tensor, tangent: Maybe, frequencies: Tensor) -> Dual:
    """[cos(f t), sin(f t)] for times [B] and frequencies f [n]: [B, 2 n], in the dtype of the frequencies."""
    phase = time[:, None].to(frequencies.dtype) * frequencies
    cos, sin = phase.cos(), phase.sin()
    y = torch.cat([cos, sin], dim=-1)
    if tangent is None:
        return Dual(y)
    phase_t = tangent[:, None].to(frequencies.dtype) * frequencies
    return Dual(y, torch.cat([-sin * phase_t, cos * phase_t], dim=-1))


def _product(tangent: Maybe, factor: Tensor) -> Maybe:
    return None if tangent is None else tangent * factor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
