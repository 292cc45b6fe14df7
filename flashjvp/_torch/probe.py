"""Tries out whether an unknown release of PyTorch does what levels.py needs.

A tiny operator, x ** 2, is registered as the operators of flashjvp are, and its derivatives are compared with the known
ones. That takes a quarter of a second, once, at import; the releases that the test-suite was run with skip it.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from . import levels
from .eager import may_hold_tangents

_LIBRARY = torch.library.Library("flashjvp_probe", "DEF")


def holds() -> bool:
    """Whether reverse mode, forward mode and mapping of the operator are right, alone and in one another."""
    try:
        _define()
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")  # whatever PyTorch says of itself when a JVP is first taken
            return all(torch.equal(found, expected) for found, expected in _derivatives())
    except Exception:  # whatever a new PyTorch raises, there is another way to go on
        return False


def _define() -> None:
    _LIBRARY.define("square(Tensor x) -> Tensor")
    op = torch.ops.flashjvp_probe.square.default

    def torch_square(x: Tensor) -> Tensor:
        with _torch.AutoDispatchBelowAutograd():
            return torch.square(x)

    class Square(levels.Node):
        @staticmethod
        def forward(ctx, keyset, fwd_grad, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            if levels.is_last(keyset):
                return torch_square(x)
            return levels.redispatch_in_node(op, keyset, (x,), fwd_grad)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return None, None, 2 * ctx.saved_tensors[0] * grad

    def kernel(keyset, x):  # type: ignore[no-untyped-def]
        if may_hold_tangents():
            x, x_t = _torch.unpack_dual(x)
            if x_t is not None:
                return _torch.make_dual(op(x), 2 * x * x_t)
        if levels.requires_grad((x,)):
            return levels.recorder(Square)(keyset, _torch.is_fwd_grad_enabled(), x)
        return torch_square(x) if levels.is_last(keyset) else levels.redispatch(op, keyset, (x,))

    _LIBRARY.impl("square", torch.square, "CompositeExplicitAutograd")
    _LIBRARY.impl("square", kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap("flashjvp_probe::square", lambda info, in_dims, x: (op(x), in_dims[0]), lib=_LIBRARY)


def _derivatives() -> list[tuple[Tensor, Tensor]]:
    """Pairs of what comes out and what should, of small whole numbers, so that nothing is rounded."""
    func, square = torch.func, torch.ops.flashjvp_probe.square.default
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device="cpu")
    leaf, x_t = x.clone().requires_grad_(), x + 1

    def tangent(x: Tensor) -> Any:
        return func.jvp(square, (x,), (x_t,))[1]

    outer = leaf * 1
    through_both = torch.autograd.grad(func.grad(lambda x: square(x).sum())(x).sum() + square(outer).sum(), leaf)[0]
    return [
        (torch.autograd.grad(square(leaf).sum(), leaf)[0], 2 * x),
        (func.grad(lambda x: square(x).sum())(x), 2 * x),
        (func.vmap(func.grad(square))(x), 2 * x),
        (tangent(x), 2 * x * x_t),
        (func.vmap(lambda x: func.jvp(square, (x,), (x,))[1])(x), 2 * x * x),
        (func.grad(lambda x: tangent(x).sum())(x), 2 * x_t),
        (torch.autograd.grad(tangent(leaf).sum(), leaf)[0], 2 * x_t),
        (through_both, 2 * x),
    ]
