"""Every private name of PyTorch that flashjvp uses, and what serves where a release has no such name.

A name that is missing is None here. `PER_LEVEL` says whether all names are there that the derivatives need (levels.py).
Without them public_autograd.py serves every call, by public PyTorch alone. The other names only save time: without one
of them a call takes a longer way.
"""

import functools
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def _find(path: str) -> Any:
    """What a dotted path leads to, importing modules on the way; None where something is missing."""
    head, *rest = path.split(".")
    found: Any = __import__(head)
    for i, name in enumerate(rest):
        if not hasattr(found, name):
            try:
                __import__(".".join([head, *rest[: i + 1]]))
            except ImportError:
                return None
        found = getattr(found, name, None)
    return found


# The releases that the test-suite was run with. In others probe.py looks whether the names do what they did.
TRIED = ("2.11.", "2.12.", "2.13.", "2.14.", "2.15.")

# The derivatives by level of functorch: levels.py and autograd.py.
DispatchKey = _find("torch._C.DispatchKey")
DispatchKeySet = _find("torch._C.DispatchKeySet")
after_autograd_keyset = _find("torch._C._after_autograd_keyset")
any_requires_grad = _find("torch._C._any_requires_grad")
AutoDispatchBelowAutograd = _find("torch._C._AutoDispatchBelowAutograd")
ExcludeDispatchKeyGuard = _find("torch._C._ExcludeDispatchKeyGuard")
is_fwd_grad_enabled = _find("torch._C._is_fwd_grad_enabled")
set_fwd_grad_enabled = _find("torch.autograd.forward_ad._set_fwd_grad_enabled")
# A node of one level: what functorch makes its own nodes from. torch.autograd.Function records at all levels at once.
LevelFunction = _find("torch.autograd.function._SingleLevelFunction")
enable_level_function = _find("torch._functorch.utils.enable_single_level_autograd_function")
compiled_autograd_key = _find("torch.autograd.Function._compiled_autograd_key")
_transforms_active = _find("torch._C._are_functorch_transforms_active")
_redispatch = _find("torch._ops.OpOverload.redispatch")
_raw_repr = _find("torch._C.DispatchKeySet.raw_repr")

# Calls that skip the dispatcher: eager.py, guards.py, fast_path.py.
_dispatch_modes = _find("torch._C._len_torch_dispatch_stack")
_function_modes = _find("torch._C._len_torch_function_stack")
_profiler_enabled = _find("torch.autograd._profiler_enabled")
dispatch_keys = _find("torch._C._dispatch_keys")
included_keys = _find("torch._C._dispatch_tls_local_include_set")
excluded_keys = _find("torch._C._dispatch_tls_local_exclude_set")
TensorGuards = _find("torch._C._dynamo.guards.TensorGuards")

# func.jvp without the dispatcher: func_jvp.py.
JvpInterpreter = _find("torch._C._functorch.CJvpInterpreterPtr")
TransformType = _find("torch._C._functorch.TransformType")
unwrap_level = _find("torch._C._functorch._unwrap_for_grad")
unwrap_if_dead = _find("torch._C._functorch.unwrap_if_dead")
innermost_transform = _find("torch._C._functorch.peek_interpreter_stack")
pop_transform = _find("torch._C._functorch.pop_dynamic_layer_stack")
push_transform = _find("torch._C._functorch.push_dynamic_layer_stack")
# Likewise vmap: func_vmap.py.
unwrap_mapped = _find("torch._C._functorch._unwrap_batched")
wrap_mapped = _find("torch._C._functorch._add_batch_dim")

# Recorded calls: kernels/launch/replay.py and driver.py.
TorchDispatchMode = _find("torch.utils._python_dispatch.TorchDispatchMode")
# What inductor's programs allocate with: without the dispatcher, at a third of its host time.
EMPTY_STRIDED = {
    name: allocate
    for name in ("cpu", "cuda")
    if (allocate := _find(f"torch._C._dynamo.guards._empty_strided_{name}")) is not None
}
# Without the check of torch.cuda that CUDA was initialised: there are tensors on it.
current_cuda_device = _find("torch._C._cuda_getDevice") or torch.cuda.current_device

# Trees of lists, tuples and dicts, as checkpoint.py takes and returns them.
pytree = _find("torch.utils._pytree")
# Which tensors carry a tangent at some level: integrations/, norms.py, checkpoint.py.
_level_of = _find("torch._C._functorch.maybe_get_level")
_unwrapped = _find("torch._C._functorch.get_unwrapped")

_make_dual = _find("torch._VF._make_dual")
_unpack_dual = _find("torch._VF._unpack_dual")
_is_zero = _find("torch.Tensor._is_zerotensor")
_is_wrapped = _find("torch._C._functorch.is_functorch_wrapped_tensor")
_is_legacy_batched = _find("torch._C._functorch.is_legacy_batchedtensor")


def _are_there(*names: Any) -> bool:
    return all(found is not None for found in names)


PER_LEVEL = _are_there(
    DispatchKey, DispatchKeySet, after_autograd_keyset, any_requires_grad, AutoDispatchBelowAutograd,
    ExcludeDispatchKeyGuard, is_fwd_grad_enabled, set_fwd_grad_enabled, LevelFunction, enable_level_function,
    _transforms_active, _redispatch, _raw_repr,
)  # fmt: skip
_CAN_WATCH = PER_LEVEL and _are_there(_dispatch_modes, _function_modes, _profiler_enabled)
CAN_SKIP_DISPATCHER = _CAN_WATCH and _are_there(dispatch_keys, included_keys, excluded_keys, TensorGuards)
_LEAVE_JVP = (TransformType, unwrap_level, unwrap_if_dead, innermost_transform, pop_transform, push_transform)
CAN_LEAVE_JVP = _are_there(_transforms_active, _level_of, _unwrapped, *_LEAVE_JVP)
CAN_CALL_BELOW_JVP = _CAN_WATCH and _are_there(JvpInterpreter, *_LEAVE_JVP)
CAN_CALL_BELOW_VMAP = _CAN_WATCH and _are_there(unwrap_mapped, wrap_mapped, *_LEAVE_JVP)


# Numbers compare in a third of the time that members of this enumeration take.
JVP, GRAD, VMAP = [TransformType and getattr(TransformType, name).value for name in ("Jvp", "Grad", "Vmap")]


def _unknown() -> bool:
    """The answer where a release cannot tell: yes, so that a call takes the dispatcher."""
    return True


# Every call asks these, so they are the functions of PyTorch themselves.
# Whether this thread is inside a transform of functorch (torch.func.jvp, grad, vmap, ...):
transforms_active: Callable[[], bool] = _transforms_active or _unknown
# How many TorchDispatchModes of this thread see every operator:
dispatch_modes: Callable[[], int] = _dispatch_modes or _unknown


_count_function_modes: Callable[[], int] = _function_modes or _unknown
_profiles: Callable[[], bool] = _profiler_enabled or _unknown


def is_watched() -> bool:
    """Whether something wants to see the operators of a call that it sees in the dispatcher, or traces its Python."""
    return is_compiling() or _count_function_modes() > 0 or _profiles()


def dual_level_active() -> bool:
    """Whether any thread is inside a dual level: PyTorch counts them for the whole process."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A tensor with a tangent, at the one level that PyTorch has."""
    make = forward_ad.make_dual if _make_dual is None else _make_dual
    dual: Tensor = make(primal, tangent, level=0)
    return dual


def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent of a tensor; a tangent known to be zero counts as none."""
    unpack = forward_ad.unpack_dual if _unpack_dual is None else _unpack_dual
    primal, tangent = unpack(x, level=0)
    if tangent is not None and is_zero(tangent):
        tangent = None
    return primal, tangent


def is_wrapped(x: Tensor) -> bool:
    """Whether a transform of functorch wraps a tensor; without the name, whether one could."""
    return transforms_active() if _is_wrapped is None else bool(_is_wrapped(x))


def is_zero(x: Tensor) -> bool:
    """Whether a tensor is a zero that PyTorch knows as such, and holds no memory for."""
    return _is_zero is not None and bool(_is_zero(x))


def may_carry_tangents() -> bool:
    """Whether any tensor of this thread may have a tangent, at any level."""
    return transforms_active() or dual_level_active()


def is_in_func_jvp() -> bool:
    """Whether the innermost transform is torch.func.jvp, which can be left for a while."""
    return CAN_LEAVE_JVP and transforms_active() and bool(innermost_transform().key().value == JVP)


def level_gives_tangents() -> bool:
    """Whether tensors may be dual at the level that this thread is at, and can be asked (those of a vmap cannot).

    They may be at that of torch.func.grad: a dual level inside of it.
    """
    if not transforms_active():
        return True
    return CAN_LEAVE_JVP and innermost_transform().key().value in (JVP, GRAD)


def is_of_innermost_level(x: object) -> bool:
    """Whether the innermost transform made a tensor, or one that it was computed from."""
    return isinstance(x, Tensor) and is_wrapped(x) and bool(_level_of(x) == innermost_transform().level())


def carries_tangent(x: object) -> bool:
    """Whether a tensor has a tangent at any level of this thread; without the names that tell, whether it may have."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return False
    if not transforms_active():
        return unpack_dual(x)[1] is not None
    if not CAN_LEAVE_JVP:
        return True
    transform = innermost_transform()
    kind = transform.key().value
    if kind == JVP and not is_wrapped(x):  # PyTorch allows no dual level outside of this
        return False
    if kind in (JVP, GRAD) and unpack_dual(x)[1] is not None:
        return True
    inner = _unwrapped(x) if _level_of(x) == transform.level() else x
    layer = pop_transform()
    try:
        return carries_tangent(inner)
    finally:
        push_transform(layer)


def needs_gradient(x: Tensor) -> bool:
    """Whether a tensor has a gradient at any level of this thread; without the names that tell, at the innermost."""
    while not x.requires_grad:
        if _is_wrapped is None or _unwrapped is None or not _is_wrapped(x):
            return False
        x = _unwrapped(x)
    return True


def once_a_trace(function: Callable[..., None]) -> Callable[..., None]:
    """torch.compile runs the function once for each trace, and leaves nothing in the graph. (The public decorator,
    `torch.compiler.assume_constant_result`, imports the compiler.)"""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_legacy_batched(x: Tensor) -> bool:
    """Whether `torch.autograd`'s own vmap, which `vectorize=True` and gradcheck use, wraps a tensor."""
    return _is_legacy_batched is not None and bool(_is_legacy_batched(x))


def below_autograd() -> AbstractContextManager[Any]:
    """No autograd in the dispatcher, which guards compare."""
    return nullcontext() if AutoDispatchBelowAutograd is None else AutoDispatchBelowAutograd()


def keyset(*names: str) -> Any:
    """The set of dispatch keys with these names."""
    return functools.reduce(operator.or_, [DispatchKeySet(getattr(DispatchKey, name)) for name in names])
