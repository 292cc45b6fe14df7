"""Compositions of PyTorch's transforms with attention: each must give what the explicit call gives, or raise.

The explicit call is `attention_jvp`, which takes tangents as arguments. Each function takes the inputs of a call and a
subject (the backend that is judged), and returns an Identity for each quantity that it compares.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import NAMES, Attention, Results, Subject, operands
from .derivatives import Maybe, as_explicit, forward_mode, leaves_of, placed, raises, reverse


def func_jvp(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.func.jvp in the inputs that have a tangent, then autograd.grad through both outputs."""
    leaves = leaves_of(inputs)
    outputs = forward_mode(subject.attention(inputs), leaves[:3], leaves[3:])
    return as_explicit(reverse(outputs, leaves, inputs), inputs, subject)


def dual_level(inputs: Inputs, subject: Subject) -> list[Identity]:
    """forward_ad's dual tensors, then autograd.grad outside their level."""
    leaves, f = leaves_of(inputs), subject.attention(inputs)
    with forward_ad.dual_level():
        pairs = zip(leaves[:3], leaves[3:], strict=True)
        o, o_t = forward_ad.unpack_dual(f(*(x if x_t is None else forward_ad.make_dual(x, x_t) for x, x_t in pairs)))
    return as_explicit(reverse((o, o_t), leaves, inputs), inputs, subject)


def func_grad(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.func.grad over torch.func.jvp."""
    results = _grad(subject.attention(inputs), operands(inputs), (inputs.d_o, inputs.d_o_t))
    return as_explicit(Results(*results), inputs, subject)


def outer_level(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The outputs inside torch.func.grad of inputs that require a gradient outside it, under autograd.grad."""
    leaves = leaves_of(inputs)
    o, o_t, *_ = _grad(subject.attention(inputs), leaves, (inputs.d_o, inputs.d_o_t))
    return as_explicit(reverse((o, o_t), leaves, inputs), inputs, subject)


def mapped(inputs: Inputs, subject: Subject) -> list[Identity]:
    """torch.func.vmap of torch.func.grad over torch.func.jvp, over the first batch dim moved behind the next one, and
    of torch.func.jvp alone, with autograd.grad outside."""
    if inputs.mask is not None or inputs.q.ndim < 4 or inputs.q.shape[0] == 0:
        return []
    tensors: list[Any] = [x if x is None else x.movedim(0, 1) for x in (*operands(inputs), inputs.d_o, inputs.d_o_t)]
    present = [i for i, x in enumerate(tensors) if x is not None]
    f = subject.attention(inputs)

    def of_one(*xs: Tensor) -> dict[str, Tensor]:
        one = placed(xs, present, tensors)
        return {name: x for name, x in zip(NAMES, _grad(f, one[:6], one[6:]), strict=True) if x is not None}

    results: dict[str, Any] = vmap(of_one, in_dims=1)(*(tensors[i] for i in present))
    ordered: list[Any] = [results.get(name) for name in NAMES]
    leaves = leaves_of(inputs)
    given = [i for i, x in enumerate(leaves) if x is not None]

    def jvp_of_one(*xs: Tensor) -> tuple[Tensor, ...]:
        one = placed(xs, given, leaves)
        return tuple(y for y in forward_mode(f, one[:3], one[3:]) if y is not None)

    o, *o_t = vmap(jvp_of_one, in_dims=1)(*[x.movedim(0, 1) for x in leaves if x is not None])
    of_jvp = as_explicit(reverse((o, o_t[0] if o_t else None), leaves, inputs), inputs, subject)
    return as_explicit(Results(*ordered), inputs, subject) + of_jvp


def second_order(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Every derivative beyond one JVP and one backward pass raises SecondOrderError."""
    f, q, q_t = subject.attention(inputs), inputs.q, torch.ones_like(inputs.q)

    def of_q(q: Tensor) -> Tensor:
        return f(q, inputs.k, inputs.v)

    def loss(q: Tensor) -> Tensor:
        return of_q(q).sin().sum()

    def tangent(q: Tensor) -> Tensor:
        return jvp(of_q, (q,), (q_t,))[1]

    def double_backward(f: Callable[[Tensor], Tensor]) -> None:
        leaf = q.detach().requires_grad_()
        (d_q,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
        torch.autograd.grad(d_q.sum(), leaf, allow_unused=True)

    def backward_inside_the_level() -> None:
        leaf = q.detach().requires_grad_()
        with forward_ad.dual_level():
            o, o_t = forward_ad.unpack_dual(of_q(forward_ad.make_dual(leaf, q_t)))
            torch.autograd.grad([o, o_t], leaf, [torch.ones_like(o)] * 2)

    beyond: dict[str, Callable[[], Any]] = {
        "grad of grad": lambda: grad(lambda q: grad(loss)(q).sum())(q),
        "jvp of jvp": lambda: jvp(tangent, (q,), (q_t,)),
        "jvp of grad": lambda: jvp(grad(loss), (q,), (q_t,)),
        "double backward": lambda: double_backward(of_q),
        "double backward of jvp": lambda: double_backward(tangent),
        "backward inside a dual level": backward_inside_the_level,
    }
    return [raises(name, call) for name, call in beyond.items()]


def _grad(f: Attention, leaves: Sequence[Any], cotangents: Sequence[Maybe]) -> list[Any]:
    """o, o_t and the six gradients by torch.func.grad of <o, d_o> + <o_t, d_o_t>, None where absent."""
    present = [i for i, x in enumerate(leaves) if x is not None]

    def loss(*xs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = placed(xs, present, leaves)
        o, o_t = forward_mode(f, tensors[:3], tensors[3:])
        pairs = zip((o, o_t), cotangents, strict=True)
        total = torch.stack([(y * d).sum() for y, d in pairs if y is not None and d is not None]).sum()
        return total, {"o": o} if o_t is None else {"o": o, "o_t": o_t}

    over_present = grad(loss, argnums=tuple(range(len(present))), has_aux=True)
    grads, outputs = over_present(*(leaves[i] for i in present))
    return [outputs["o"], outputs.get("o_t"), *placed(grads, present, [None] * len(leaves))]
