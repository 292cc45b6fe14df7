"""Dual tensors that reach a function which was compiled without them: its other operators would lose the tangents."""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashjvp import UnsupportedError
from flashjvp.operators import FORWARD

from .cases import Inputs
from .oracles import Subject, operands
from .tolerance import Identity
from .transformed import placed, raises


def duals_outside(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A dual level around a compiled function raises UnsupportedError, and so does one around an operator alone, which
    is what such a function calls."""
    tensors = [x.detach() for x in operands(inputs)[:3]]
    mask = None if inputs.mask is None else inputs.mask[(None,) * (inputs.q.ndim - inputs.mask.ndim)]
    options = mask, inputs.is_causal, inputs.scale, subject.backend
    attention = subject.attention(inputs)

    def of_dual(i: int) -> list[Tensor]:
        return placed([forward_ad.make_dual(tensors[i], torch.ones_like(tensors[i]))], [i], tensors)

    def operator(i: int) -> None:
        with forward_ad.dual_level():
            FORWARD(*of_dual(i), *options)

    def compiled() -> None:
        torch._dynamo.reset()  # how often a function may be compiled is limited
        function = torch.compile(lambda q, k, v: attention(q, k, v).sin(), backend="eager")
        with forward_ad.dual_level():
            function(*of_dual(0))

    found = [raises(f"a tangent of {'qkv'[i]}", functools.partial(operator, i), UnsupportedError) for i in range(3)]
    return [*found, raises("a compiled function", compiled, UnsupportedError)]
