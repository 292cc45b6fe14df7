"""Derivatives of a call by PyTorch's transforms and autograd, and their comparison with those of the explicit call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from flashjvp import SecondOrderError

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Attention, Results, Subject, operands

Maybe = Tensor | None


def as_explicit(results: Results, inputs: Inputs, subject: Subject) -> list[Identity]:
    """Compares results with those of the explicit call: `attention_jvp`, which takes tangents as arguments."""
    return tolerance.same_results(results, subject.results(inputs), inputs, inputs)


def raises(name: str, call: Callable[[], Any], expected: type[Exception] = SecondOrderError) -> Identity:
    """Checks that a call raises the error that says why it has no result."""
    try:
        call()
    except expected:
        return Identity(name, None, None, True)
    return Identity(name, None, None, False, f"expected {expected.__name__}, got a result")


def leaves_of(inputs: Inputs) -> list[Any]:
    """q, k, v and their tangents as tensors that require a gradient, None where absent."""
    return [x if x is None else x.detach().requires_grad_() for x in operands(inputs)]


def placed(xs: Sequence[Any], at: Sequence[int], into: Sequence[Any]) -> list[Any]:
    """A copy of `into` with the xs at the places `at`."""
    filled = list(into)
    for i, x in zip(at, xs, strict=True):
        filled[i] = x
    return filled


def forward_mode(f: Attention, primals: Sequence[Any], tangents: Sequence[Maybe]) -> tuple[Tensor, Maybe]:
    """o and o_t (None without tangents) by a JVP in those primals alone that have a tangent."""
    given = [i for i, x in enumerate(tangents) if x is not None]
    if not given:
        return f(*primals), None

    def of_given(*xs: Tensor) -> Tensor:
        return f(*placed(xs, given, primals))

    o, o_t = jvp(of_given, tuple(primals[i] for i in given), tuple(tangents[i] for i in given))[:2]
    return o, o_t


def reverse(outputs: Sequence[Any], leaves: Sequence[Any], inputs: Inputs) -> Results:
    """The results, their gradients by autograd.grad; an output without a graph adds nothing to these."""
    pairs = zip(outputs, (inputs.d_o, inputs.d_o_t), strict=True)
    used = [(y, d) for y, d in pairs if y is not None and d is not None and y.requires_grad]
    ys, d_ys = [y for y, _ in used], [d for _, d in used]
    present = [x for x in leaves if x is not None]
    grads = iter(torch.autograd.grad(ys, present, d_ys, allow_unused=True, materialize_grads=True))
    results: list[Any] = [y if y is None else y.detach() for y in outputs]
    return Results(*results, *(None if x is None else next(grads) for x in leaves))
