"""torch.compile with forward-mode dual tensors: no compiled function may return a wrong tangent.

With the dual level inside of the function the tangent must be there. With the level around it, it may be lacking.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashjvp import UnsupportedError
from flashjvp.dispatch.schema import FORWARD

from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Subject, operands
from .derivatives import Maybe, placed, raises


def compiled_duals(inputs: Inputs, subject: Subject) -> list[Identity]:
    """No tangent that comes out of a compiled function is wrong, with a dual level around it or inside of it.

    Inside, the tangent is there. Around it UnsupportedError is raised, or PyTorch leaves the function uncompiled (from
    2.14 on). The operator alone, which is what a compiled function calls, raises in a dual level.
    """
    tensors = [x.detach() for x in operands(inputs)[:3]]
    mask = None if inputs.mask is None else inputs.mask[(None,) * (inputs.q.ndim - inputs.mask.ndim)]
    options = mask, None, inputs.is_causal, inputs.scale, subject.backend, 0.0
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
