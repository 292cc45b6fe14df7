"""Tells whether a call may skip PyTorch's dispatcher.

It may where the dispatcher would go straight from autograd to the implementation of the operator: no transform, dual
level, mode, tracing, autocast or profiler is active.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import Tensor

from .. import _torch

# By device type, the keyset of an operator with nothing but its implementation below its derivatives: no transform,
# mode or subclass.
KEYSETS: dict[str, Any] = {}
# What plain calls have besides: nothing that an operator of this package acts on.
_IDLE: Any = None
_AUTOCAST: Any = None
if _torch.PER_LEVEL:
    KEYSETS = {"cpu": _torch.keyset("CPU", "AutogradCPU"), "cuda": _torch.keyset("CUDA", "AutogradCUDA")}
    _IDLE = _torch.keyset("BackendSelect", "ADInplaceOrView")
    _AUTOCAST = _torch.keyset("AutocastCPU", "AutocastCUDA")

# Flags of a thread. "public": it runs a call of `attention` while a dual level is open. "split": it runs forward_jvp on
# primals and tangents taken from dual tensors. "below_jvp": it has left func.jvp for a call in which no tensor has a
# tangent (func_jvp.py).
State = Literal["public", "split", "below_jvp"]
_THREAD = threading.local()  # mutate: _THREAD


class marked:
    """Sets the flag of this thread in the block."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._before = getattr(_THREAD, self._state, False)
        setattr(_THREAD, self._state, True)

    def __exit__(self, *_: object) -> None:
        setattr(_THREAD, self._state, self._before)


def is_marked(state: State) -> bool:
    """Whether the flag of this thread is set."""
    return getattr(_THREAD, state, False)


def may_hold_tangents() -> bool:
    """Whether tensors of this thread may be dual at its present level.

    PyTorch counts dual levels for the whole process, so that an open one may belong to another thread.
    """
    if _torch.transforms_active() or _torch.dispatch_modes():
        return True
    return _torch.dual_level_active() and not is_marked("below_jvp")


def without_autocast() -> AbstractContextManager[Any]:
    """No autocast in the dispatcher: products keep the types of their factors."""
    guard: AbstractContextManager[Any] = _torch.ExcludeDispatchKeyGuard(_AUTOCAST)
    return guard


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would lead from autograd straight to the backend, with autocast off, for these tensors.

    Takes longer than the dispatcher; a guard (guards.py) tells in less time that a call is like one that was plain.
    """
    keyset = KEYSETS.get(tensors[0].device.type)
    if keyset is None:
        return False
    allowed = keyset | _IDLE
    included, excluded = _torch.included_keys(), _torch.excluded_keys()
    return all((((_torch.dispatch_keys(x) | included) - excluded) | allowed) == allowed for x in tensors)
