"""Tells which tensors of an operator carry a tangent at the present level. Nothing is computed here."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch.eager import may_hold_tangents
from ..errors import ArgumentTypeError

Maybe = Tensor | None


def may_be_compiled() -> bool:
    """Whether torch.compile may have compiled what calls an operator, or may compile the Python that it runs in."""
    return "torch._dynamo" in sys.modules


def may_be_dual() -> bool:
    """Whether the tensors of an operator have to be asked for tangents: a compiled function enters a dual level in C++,
    and Python's own count of levels misses that."""
    # mutate: return may_be_compiled may_hold_tangents
    return may_be_compiled() or may_hold_tangents()


def has_tangent(tensors: Sequence[Any]) -> bool:
    """Whether any of these is a tensor with a tangent."""
    return any(_torch.unpack_dual(x)[1] is not None for x in tensors if isinstance(x, Tensor))


def split(name: str, x: Tensor) -> tuple[Tensor, Maybe]:
    """Primal and tangent of an argument."""
    primal, tangent = _torch.unpack_dual(x)
    if tangent is not None and tangent.dtype != primal.dtype:
        raise ArgumentTypeError(
            f"{name}: expected a tangent of the dtype of its primal, {primal.dtype}, got {tangent.dtype}"
        )
    return primal, tangent


def split_mask(mask: Maybe) -> tuple[Maybe, Maybe]:
    """The same of a mask; a choice of keys has no tangent."""
    return (mask, None) if mask is None or not mask.is_floating_point() else split("attn_mask", mask)


def in_present_level() -> Tensor:
    """A number with a tangent, which it loses when the dual level ends, whatever levels there are after that."""
    with _torch.set_fwd_grad_enabled(True):
        return _torch.make_dual(torch.zeros((), device="cpu"), torch.ones((), device="cpu"))
