"""Records an operator's autograd node at one level of functorch, and calls the operator again below that level.

A level is plain eager, or one transform such as torch.func.grad; nested transforms are levels on top of one another.
The operators of this package use this (autograd.py), and so does the tiny one by which probe.py tries out a release of
PyTorch that the tests were not run with.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _torch
from .eager import KEYSETS

_LAST = {keyset.raw_repr() for keyset in KEYSETS.values()}


_Base: Any = _torch.LevelFunction or object


class Node(_Base):
    """A node of one level. Compiled autograd asks every Function for a key."""

    _compiled_autograd_key = staticmethod(_torch.compiled_autograd_key)


def requires_grad(args: Sequence[Any]) -> bool:
    """Whether a node has to be recorded at the current level."""
    return torch.is_grad_enabled() and _torch.any_requires_grad(*args)


def recorder(node: Any) -> Callable[..., Any]:
    """What records `node` at the current level, when called with the arguments of its forward."""
    return functools.partial(_record_in_transform, node) if _torch.transforms_active() else node.apply


def _record_in_transform(node: Any, *args: Any) -> Any:
    with _torch.enable_level_function():
        return node.apply(*args)


def is_last(keyset: Any) -> bool:
    """Whether nothing is left below this level's derivatives but the implementation of the operator."""
    return keyset.raw_repr() in _LAST


def redispatch(op: Any, keyset: Any, args: Sequence[Any]) -> Any:
    """The operator below this level's derivatives."""
    with _torch.AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _torch.after_autograd_keyset, *args)


def redispatch_in_node(op: Any, keyset: Any, args: Sequence[Any], fwd_grad: bool) -> Any:
    """The same inside a node's forward, where grad modes are off, with those that outer levels need to record."""
    # mutate: with torch enable_grad
    with torch.enable_grad(), _torch.set_fwd_grad_enabled(fwd_grad):
        return redispatch(op, keyset, args)
