"""Dual levels and compiled functions: around one its other operators may lose the tangents, in one nothing may."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashjvp import UnsupportedError
from flashjvp.dispatch.schema import FORWARD

from ..budget.tolerance import Identity
from ..cases.attention import Inputs
from ..oracles.attention import Subject, operands
from .transformed import Maybe, placed, raises


def compiled_duals(inputs: Inputs, subject: Subject) -> list[Identity]:
    """No tangent is wrong that comes out of a compiled function, with a dual level around it or in it.

    In it the tangent is there. Around it UnsupportedError is raised, or PyTorch leaves the function uncompiled (from
    2.14 on). The operator alone, which is what a compiled function calls, raises in a level of Python's.
    """
    tensors = [x.detach() for x in operands(inputs)[:3]]
    mask = None if inputs.mask is None else inputs.mask[(None,) * (inputs.q.ndim - inputs.mask.ndim)]
    options = mask, inputs.is_causal, inputs.scale, subject.backend
    attention = subject.attention(inputs)

    def of_dual(i: int) -> list[Tensor]:
        return placed([forward_ad.make_dual(tensors[i], torch.ones_like(tensors[i]))], [i], tensors)

    def operator(i: int) -> None:
        with forward_ad.dual_level():
            FORWARD.handle(*of_dual(i), *options)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v).sin() * q.sum()

    def around(function: Callable[..., Tensor]) -> Maybe:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(*of_dual(0))).tangent

    def inside() -> Maybe:
        return around(function)

    expected = inside()
    found = [raises(f"a tangent of {'qkv'[i]}", functools.partial(operator, i), UnsupportedError) for i in range(3)]
    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()  # how often a function may be compiled is limited
        found.append(_right(f"in a function, {compiler}", torch.compile(inside, backend=compiler)(), expected))
        try:
            tangent = around(torch.compile(function, backend=compiler))
        except UnsupportedError:
            tangent = None
        found.append(_right(f"around a function, {compiler}", tangent, expected, may_lack=True))
    return found


def _right(name: str, tangent: Maybe, expected: Maybe, may_lack: bool = False) -> Identity:
    assert expected is not None
    ok = may_lack if tangent is None else torch.equal(tangent, expected)
    return Identity(name, None, None, ok, "" if ok else "expected the tangent of an uncompiled call, got another")
