"""Whether anything stands between a call and a backend: transforms, dual levels, modes, tracing, autocast, a profiler.

Where nothing does, the dispatcher of PyTorch would lead straight from autograd to the implementation of an operator,
and a call may go there without it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _dispatch_keys,
    _dispatch_tls_local_exclude_set,
    _dispatch_tls_local_include_set,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._functorch import eager_transforms
from torch.autograd import _profiler_enabled, forward_ad

# By device type, the keyset of an operator with nothing but its implementation below its derivatives: no transform,
# mode or subclass.
KEYSETS = {
    "cpu": DispatchKeySet(DispatchKey.CPU) | DispatchKeySet(DispatchKey.AutogradCPU),
    "cuda": DispatchKeySet(DispatchKey.CUDA) | DispatchKeySet(DispatchKey.AutogradCUDA),
}
# What plain calls have besides: nothing that an operator of this package acts on.
_IDLE = DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)


def may_hold_tangents() -> bool:
    """Whether a dual level may be active. AOT replay raises the level in C++ only, hence the dispatch modes.

    The level of func.jvp concerns what functorch wraps; tensors below all transforms have no tangents of it.
    """
    if _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0:
        return True
    return forward_ad._current_level >= 0 and eager_transforms.JVP_NESTING == 0


def is_watched() -> bool:
    """Whether something wants to see the operators of a call that it sees in the dispatcher, or traces its Python."""
    watched: bool = torch.compiler.is_compiling() or _len_torch_function_stack() > 0 or _profiler_enabled()
    return watched


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would lead from autograd straight to the backend, with autocast off, for these tensors.

    Takes longer than the dispatcher; a guard (guards.py) tells in less time that a call is like one that was plain.
    """
    keyset = KEYSETS.get(tensors[0].device.type)
    if keyset is None:
        return False
    allowed = keyset | _IDLE
    included, excluded = _dispatch_tls_local_include_set(), _dispatch_tls_local_exclude_set()
    return all((((_dispatch_keys(x) | included) - excluded) | allowed) == allowed for x in tensors)
