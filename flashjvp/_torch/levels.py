"""How an Autograd-key kernel records a node and goes on below it, one level of functorch at a time.

Every operator of this package is wired so (autograd.py), and so is the tiny one that tells whether a PyTorch that
nobody has tried does what this needs (probe.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _torch
from .eager import KEYSETS

_LAST = {keyset.raw_repr() for keyset in KEYSETS.values()}  # nothing but the implementation below the derivatives


_Base: Any = _torch.LevelFunction or object


class Node(_Base):
    """A node of one level. Compiled autograd asks every Function for a key."""

    _compiled_autograd_key = staticmethod(_torch.compiled_autograd_key)


def apply(node: Any, *args: Any) -> Any:
    """Records `node` at the current level."""
    if not _torch.transforms_active():
        return node.apply(*args)
    with _torch.enable_level_function():
        return node.apply(*args)


def requires_grad(args: Sequence[Any]) -> bool:
    """Whether a node has to be recorded at the current level."""
    return torch.is_grad_enabled() and _torch.any_requires_grad(*args)


def redispatch(op: Any, implementation: Callable[..., Any], keyset: Any, args: Sequence[Any]) -> Any:
    """The operator below this level's derivatives."""
    with _torch.AutoDispatchBelowAutograd():
        if keyset.raw_repr() in _LAST:
            return implementation(*args)
        return op.redispatch(keyset & _torch.after_autograd_keyset, *args)


def redispatch_in_node(
    op: Any, implementation: Callable[..., Any], keyset: Any, args: Sequence[Any], fwd_grad: bool
) -> Any:
    """The same inside a node's forward, where grad modes are off, with those that outer levels need to record."""
    if keyset.raw_repr() in _LAST:
        return redispatch(op, implementation, keyset, args)
    # mutate: with torch enable_grad
    with torch.enable_grad(), _torch.set_fwd_grad_enabled(fwd_grad):
        return redispatch(op, implementation, keyset, args)
