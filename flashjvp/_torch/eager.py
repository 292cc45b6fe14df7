"""Whether anything stands between a call and a backend: transforms, dual levels, modes, tracing, autocast, a profiler.

Where nothing does, the dispatcher of PyTorch would lead straight from autograd to the implementation of an operator,
and a call may go there without it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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

# What a thread is doing: "public" is a call of `attention` while some thread is in a dual level, "split" an operator of
# the primals and tangents of one, "lowered" a call below func.jvp, which took all tangents off (func_jvp.py).
State = Literal["public", "split", "lowered"]
_THREAD = threading.local()  # mutate: _THREAD


@contextmanager
def marked(state: State) -> Iterator[None]:
    """This thread is doing so."""
    before = getattr(_THREAD, state, False)
    setattr(_THREAD, state, True)
    try:
        yield
    finally:
        setattr(_THREAD, state, before)


def is_marked(state: State) -> bool:
    """Whether this thread is doing so."""
    return getattr(_THREAD, state, False)


def may_hold_tangents() -> bool:
    """Whether tensors of this thread may be dual at its present level.

    A dual level is of all threads, so a level says little and each tensor has to be asked.
    """
    if _torch.transforms_active() or _torch.dispatch_modes_active():
        return True
    return _torch.dual_level_active() and not is_marked("lowered")


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
