"""Derivatives of the four operators, for reverse mode, forward mode and reverse over forward.

An Autograd-key kernel sees the tensors of one level (plain eager, or one functorch transform). It
1. splits dual inputs into primals and tangents and, where there is a tangent, calls `forward_jvp` and makes dual
   results, so that forward mode costs one launch;
2. records one autograd node when an input requires a gradient, whose backward calls the backward operator once;
3. raises SecondOrderError where an operator that is a derivative already carries a tangent, and records a node that
   raises it when one is differentiated in reverse.
Everything private that this needs from PyTorch is named in the next section.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _ExcludeDispatchKeyGuard,
    _is_fwd_grad_enabled,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad

from .eager import KEYSETS, is_plain, is_watched, may_hold_tangents
from .errors import SecondOrderError, UnsupportedError
from .guards import Remembered
from .operators import BACKWARD, BACKWARD_JVP, FORWARD, FORWARD_JVP, IMPLEMENTATIONS, bound, library

Maybe = Tensor | None

_LAST = {keyset.raw_repr() for keyset in KEYSETS.values()}  # nothing but the implementation below the derivatives
_unpack_dual, _make_dual = torch._VF._unpack_dual, torch._VF._make_dual


def _apply(node: type[Function], *args: Any) -> Any:
    """Records `node` at the current level alone; Function.apply would record it at every functorch level at once."""
    if not _are_functorch_transforms_active():
        return super(Function, node).apply(*args)  # type: ignore[misc]
    with enable_single_level_autograd_function():
        return super(Function, node).apply(*args)  # type: ignore[misc]


def _redispatch(op: Any, keyset: Any, args: Sequence[Any]) -> Any:
    with _AutoDispatchBelowAutograd():
        if keyset.raw_repr() in _LAST:
            return IMPLEMENTATIONS[op](*args)
        return op.redispatch(keyset & _after_autograd_keyset, *args)


def _redispatch_in_node(op: Any, keyset: Any, args: Sequence[Any], fwd_grad: bool) -> Any:
    """Redispatches inside a node's forward, where grad modes are off, with those that outer levels need to record."""
    if keyset.raw_repr() in _LAST:
        return _redispatch(op, keyset, args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(fwd_grad):
        return _redispatch(op, keyset, args)


def _split(x: Maybe) -> tuple[Maybe, Maybe]:
    """Primal and tangent of a tensor; a tangent known to be zero counts as none."""
    if x is None:
        return None, None
    primal, tangent = _unpack_dual(x, level=0)
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


def _has_tangent(tensors: Sequence[Any]) -> bool:
    return any(_split(x)[1] is not None for x in tensors if isinstance(x, Tensor))


def _requires_grad(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and _any_requires_grad(*args)


_LEAVE = "leave the forward-mode level (torch.func.jvp, dual_level) before the backward pass"


def _second_order(op: Any) -> SecondOrderError:
    return SecondOrderError(
        f"{op.name()}: expected at most one JVP followed by one backward pass, got a derivative of that; {_LEAVE}"
    )


# The nodes. `below` gives the results of an operator from its tensors; `options` are the rest of its arguments.


class _Forward(Function):
    @staticmethod
    def forward(ctx, below, options, *tensors):  # type: ignore[no-untyped-def]
        o, lse = below(tensors)
        q, k, v, mask = tensors
        ctx.save_for_backward(q, k, v, o, lse, mask)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, d_o, _):  # type: ignore[no-untyped-def]
        if d_o is None:
            return (None,) * 6
        wanted = ctx.needs_input_grad[2:5]
        grads = _derived(BACKWARD, (d_o, *ctx.saved_tensors), ctx.options, wanted)
        return None, None, *grads, None


class _ForwardJvp(Function):
    @staticmethod
    def forward(ctx, below, options, *tensors):  # type: ignore[no-untyped-def]
        o, o_t, lse, mu = below(tensors)
        q, k, v, q_t, k_t, v_t, mask = tensors
        ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, mask)
        ctx.options = options
        ctx.in_dual_level = forward_ad._current_level >= 0 and not _are_functorch_transforms_active()
        ctx.mark_non_differentiable(lse, mu)
        ctx.set_materialize_grads(False)
        return o, o_t, lse, mu

    @staticmethod
    def backward(ctx, d_o, d_o_t, *_):  # type: ignore[no-untyped-def]
        if ctx.in_dual_level and forward_ad._current_level >= 0:
            raise _second_order(BACKWARD_JVP)
        if d_o is None and d_o_t is None:
            return (None,) * 9
        wanted = ctx.needs_input_grad[2:8]
        grads = _derived(BACKWARD_JVP, (d_o, d_o_t, *ctx.saved_tensors), ctx.options, wanted)
        return None, None, *grads, None


class _Backward(Function):
    """A backward operator whose inputs require a gradient: func.grad always asks for that graph and seldom uses it."""

    @staticmethod
    def forward(ctx, op, keyset, fwd_grad, wanted, *args):  # type: ignore[no-untyped-def]
        ctx.op = op
        grads = _redispatch_in_node(op, keyset, (*args, wanted), fwd_grad)
        ctx.mark_non_differentiable(*(grad for grad, want in zip(grads, wanted, strict=True) if not want))
        return grads

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise _second_order(ctx.op)


_PLAIN: Remembered[Callable[[Sequence[Maybe]], Any]] = Remembered()


def _derived(op: Any, tensors: Sequence[Maybe], options: tuple[Any, ...], wanted: tuple[bool, ...]) -> Any:
    """The gradients, without the dispatcher where tensors like these were seen to be plain and record no node."""
    if not (torch.is_grad_enabled() or is_watched() or may_hold_tangents()):
        given = [x for x in tensors if x is not None]
        key = op, options, wanted, given[0].shape, tuple([x is None for x in tensors])
        if (below := _PLAIN.find(key, given)) is not None:
            return below(tensors)
        if _PLAIN.saw(key) and is_plain(given):
            _PLAIN.keep(key, given, bound(op, tensors, options, wanted))
    grads = op(*tensors, *options, wanted)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


# The Autograd-key kernels


def _forward(keyset, q, k, v, mask, *options):  # type: ignore[no-untyped-def]
    if may_hold_tangents():
        _reject_mask_tangent(mask)
        (q, q_t), (k, k_t), (v, v_t) = _split(q), _split(k), _split(v)
        if not (q_t is None and k_t is None and v_t is None):
            args = (q, k, v, q_t, k_t, v_t, mask, *options)
            # Under a transform all tensors go the same way from here, whatever their keys.
            o, o_t, lse, _ = _record_jvp(keyset, args) if _are_functorch_transforms_active() else FORWARD_JVP(*args)
            return _make_dual(o, o_t, level=0), lse
    args = (q, k, v, mask, *options)
    if _requires_grad(args):
        return _record(FORWARD, keyset, args)
    return _redispatch(FORWARD, keyset, args)


def _forward_jvp(keyset, *args):  # type: ignore[no-untyped-def]
    if may_hold_tangents():
        _reject_mask_tangent(args[6])
        if _has_tangent(args):
            raise _second_order(FORWARD_JVP)
    return _record_jvp(keyset, args)


def _record_jvp(keyset: Any, args: Sequence[Any]) -> Any:
    """`forward_jvp` of tensors without tangents."""
    if _requires_grad(args):
        return _record(FORWARD_JVP, keyset, args)
    return _redispatch(FORWARD_JVP, keyset, args)


def _record(op: Any, keyset: Any, args: Sequence[Any]) -> Any:
    """The results of a forward operator, of tensors without tangents of which one requires a gradient."""
    options, fwd_grad = (*args[-3:],), _is_fwd_grad_enabled()
    return record(
        op, lambda tensors: _redispatch_in_node(op, keyset, (*tensors, *options), fwd_grad), args[:-3], options
    )


def record(op: Any, below: Callable[[Sequence[Maybe]], Any], tensors: Sequence[Maybe], options: tuple[Any, ...]) -> Any:
    """The same, computed by `below` from the tensors, with its node."""
    return _apply(_Forward if op is FORWARD else _ForwardJvp, below, options, *tensors)


def _backward_kernel(op: Any) -> Callable[..., Any]:
    def kernel(keyset, *args):  # type: ignore[no-untyped-def]
        if may_hold_tangents() and _has_tangent(args):
            raise _second_order(op)
        if _requires_grad(args):
            return _apply(_Backward, op, keyset, _is_fwd_grad_enabled(), args[-1], *args[:-1])
        return _redispatch(op, keyset, args)

    return kernel


def _reject_mask_tangent(mask: Maybe) -> None:
    if mask is not None and mask.is_floating_point() and _split(mask)[1] is not None:
        raise UnsupportedError("attn_mask: expected a mask without a tangent, got one that has a tangent")


def _without_autocast(op: Any, key: str) -> Callable[..., Any]:
    """attention casts its arguments itself; products inside an operator must keep the type that the backend chose."""
    autocast = DispatchKeySet(getattr(DispatchKey, key))

    def kernel(*args):  # type: ignore[no-untyped-def]
        with _ExcludeDispatchKeyGuard(autocast):
            return op(*args)

    return kernel


library.impl("forward", _forward, "Autograd", with_keyset=True)
library.impl("forward_jvp", _forward_jvp, "Autograd", with_keyset=True)
library.impl("backward", _backward_kernel(BACKWARD), "Autograd", with_keyset=True)
library.impl("backward_jvp", _backward_kernel(BACKWARD_JVP), "Autograd", with_keyset=True)
for _op in (FORWARD, FORWARD_JVP, BACKWARD, BACKWARD_JVP):
    for _key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(_op, _without_autocast(_op, _key), _key)
