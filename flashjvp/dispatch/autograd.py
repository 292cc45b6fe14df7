"""Derivatives of the four operators, for reverse mode, forward mode and reverse over forward.

An Autograd-key kernel sees the tensors of one level (plain eager, or one functorch transform). It
1. splits dual inputs into primals and tangents and, where there is a tangent, calls `forward_jvp` and makes dual
   results, so that forward mode costs one launch;
2. records one autograd node when an input requires a gradient, whose backward calls the backward operator once;
3. raises SecondOrderError where an operator that is a derivative already carries a tangent, and records a node that
   raises it when one is differentiated in reverse.
It needs names that are private in PyTorch (_torch.py); public_autograd.py serves where they are missing.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch import levels
from .._torch.eager import is_marked, is_plain, marked, may_hold_tangents
from .._torch.guards import TensorKeyedCache
from .._torch.levels import apply, requires_grad
from ..errors import ArgumentTypeError, UnsupportedError, second_order
from ..operands import Operands, Options, PlainOperands
from .operators import IMPLEMENTATIONS, bound
from .schema import BACKWARD, BACKWARD_JVP, FORWARD, FORWARD_JVP, OPERATORS, Operator, library

Maybe = Tensor | None


def _redispatch(operator: Operator, keyset: Any, args: Sequence[Any]) -> Any:
    return levels.redispatch(operator.handle, IMPLEMENTATIONS[operator], keyset, args)


def _redispatch_in_node(operator: Operator, keyset: Any, args: Sequence[Any], fwd_grad: bool) -> Any:
    return levels.redispatch_in_node(operator.handle, IMPLEMENTATIONS[operator], keyset, args, fwd_grad)


def _split(name: str, x: Tensor) -> tuple[Tensor, Maybe]:
    """Primal and tangent of an argument."""
    primal, tangent = _torch.unpack_dual(x)
    if tangent is not None and tangent.dtype != primal.dtype:
        raise ArgumentTypeError(
            f"{name}: expected a tangent of the dtype of its primal, {primal.dtype}, got {tangent.dtype}"
        )
    return primal, tangent


def _may_be_compiled() -> bool:
    """Whether torch.compile may have compiled what calls an operator, or may compile the Python that it runs in."""
    return "torch._dynamo" in sys.modules


def _may_be_dual() -> bool:
    """Whether the tensors of an operator have to be asked for tangents: a compiled function enters a dual level in C++,
    and Python's own count of levels misses that."""
    # mutate: return _may_be_compiled may_hold_tangents
    return _may_be_compiled() or may_hold_tangents()


def _has_tangent(tensors: Sequence[Any]) -> bool:
    return any(_torch.unpack_dual(x)[1] is not None for x in tensors if isinstance(x, Tensor))


# The nodes. `below` gives the results of a forward operator from its tensors, and `gradients` those of its node.


class Gradients:
    """The backward operator of a node, with the options of its forward."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, operator: Operator, tensors: Sequence[Maybe], wanted: tuple[bool, ...]) -> Sequence[Maybe]:
        """The gradients that are wanted, and None for the others."""
        grads = operator.handle(*tensors, *self._options, wanted)
        return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


class BoundGradients(Gradients):
    """The same for all nodes of a forward that skips the dispatcher (fast_path.py). The backward does so, too, where
    tensors like these were seen to be plain and record no node. What a node saved is compared again: hooks may have
    put other tensors in its place."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._known: TensorKeyedCache[Callable[[Sequence[Maybe]], Any]] = TensorKeyedCache()

    def __call__(self, operator: Operator, tensors: Sequence[Maybe], wanted: tuple[bool, ...]) -> Sequence[Maybe]:
        if torch.is_grad_enabled() or _torch.is_watched() or may_hold_tangents():
            return super().__call__(operator, tensors, wanted)
        given = [x for x in tensors if x is not None]
        key = wanted, tuple([x is None for x in tensors])
        if (below := self._known.find(key, given)) is None:
            if is_plain(given):
                self._known.keep(key, given, bound(operator, operator.operands(*tensors), self._options, wanted))
            return super().__call__(operator, tensors, wanted)
        grads: Sequence[Maybe] = below(tensors)
        return grads


class _Forward(levels.Node):
    @staticmethod
    def forward(ctx, below, gradients, *tensors):  # type: ignore[no-untyped-def]
        o, lse = below(tensors)
        q, k, v, mask = tensors
        ctx.save_for_backward(q, k, v, o, lse, mask)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, d_o, _):  # type: ignore[no-untyped-def]
        if d_o is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, *wanted, _ = ctx.needs_input_grad
        # mutate: grads (1)
        grads = ctx.gradients(BACKWARD, (d_o, *ctx.saved_tensors), tuple(wanted))
        return None, None, *grads, None


class _ForwardJvp(levels.Node):
    @staticmethod
    def forward(ctx, below, gradients, *tensors):  # type: ignore[no-untyped-def]
        o, o_t, lse, mu = below(tensors)
        q, k, v, q_t, k_t, v_t, mask = tensors
        # mutate: ctx.save_for_backward
        ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, mask)
        ctx.gradients = gradients
        ctx.in_level = _in_present_level() if is_marked("split") else None
        ctx.mark_non_differentiable(lse, mu)
        ctx.set_materialize_grads(False)
        return o, o_t, lse, mu

    @staticmethod
    def backward(ctx, d_o, d_o_t, *_):  # type: ignore[no-untyped-def]
        if ctx.in_level is not None and _has_tangent((ctx.in_level,)):  # mutate: if ctx in_level
            raise second_order(BACKWARD_JVP.handle.name())
        if d_o is None and d_o_t is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, *wanted, _ = ctx.needs_input_grad  # mutate: _, _, *wanted, _
        # mutate: grads (2)
        grads = ctx.gradients(BACKWARD_JVP, (d_o, d_o_t, *ctx.saved_tensors), tuple(wanted))
        return None, None, *grads, None  # mutate: return grads


def _in_present_level() -> Tensor:
    """A number with a tangent, which it loses when the dual level ends, whatever levels there are after that."""
    with _torch.set_fwd_grad_enabled(True):
        return _torch.make_dual(torch.zeros((), device="cpu"), torch.ones((), device="cpu"))


class _Backward(levels.Node):
    """A backward operator whose inputs require a gradient: func.grad always asks for that graph and seldom uses it."""

    @staticmethod
    def forward(ctx, operator, keyset, fwd_grad, wanted, *args):  # type: ignore[no-untyped-def]
        ctx.operator = operator
        # mutate: grads (3)
        grads = _redispatch_in_node(operator, keyset, (*args, wanted), fwd_grad)
        ctx.mark_non_differentiable(*(grad for grad, want in zip(grads, wanted, strict=True) if not want))
        return grads

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise second_order(ctx.operator.handle.name())  # mutate: raise second_order ctx


# The Autograd-key kernels


def _forward(keyset, *args):  # type: ignore[no-untyped-def]
    operands, options, _ = FORWARD.split(args)
    _check_mask(operands.mask)
    if _may_be_dual():
        q, k, v, mask = operands
        # mutate: (q, q_t), (k, k_t), (v, v_t)
        (q, q_t), (k, k_t), (v, v_t) = _split("q", q), _split("k", k), _split("v", v)
        if not (q_t is None and k_t is None and v_t is None):  # mutate: if q_t k_t
            below = _untraced(_forward_of_duals) if _may_be_compiled() else _forward_of_duals
            return below(keyset, Operands(q, k, v, q_t, k_t, v_t, mask), options)
        operands = PlainOperands(q, k, v, mask)
    if requires_grad(operands):
        return _record(FORWARD, keyset, operands, options)
    return _redispatch(FORWARD, keyset, (*operands, *options))


@functools.cache
def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, never compiled. Where torch.compile gives up on a caller it still tries what that calls, and a
    compiled `make_dual` returns a tensor without its tangent."""
    untraced: Callable[..., Any] = torch.compiler.disable(function)
    return untraced


def _forward_of_duals(keyset: Any, operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """o, with its tangent, and lse."""
    if _torch.transforms_active():  # all tensors go the same way from here, whatever their keys
        o, o_t, lse, _ = _record_jvp(keyset, operands, options)
        return _torch.make_dual(o, o_t), lse
    # mutate: if type operands
    if type(operands.q) is Tensor and _torch.dual_level_active() and not is_marked("public"):
        raise UnsupportedError(
            "attention: expected tensors without tangents in a compiled function, whose other operators would ignore "
            "them, got dual tensors: open the dual level inside the function, or use torch.func.jvp"
        )
    with marked("split"):
        o, o_t, lse, _ = FORWARD_JVP.handle(*operands, *options)
    if _torch.is_legacy_batched(o):  # only the tangents are mapped there
        o, lse = FORWARD.handle(*operands.plain, *options)  # mutate: o, lse
    return _torch.make_dual(o, o_t), lse  # mutate: return _torch make_dual


def _forward_jvp(keyset, *args):  # type: ignore[no-untyped-def]
    operands, options, _ = FORWARD_JVP.split(args)
    _check_mask(operands.mask)
    if _may_be_dual() and _has_tangent(operands):
        raise second_order(FORWARD_JVP.handle.name())  # mutate: raise second_order FORWARD_JVP
    return _record_jvp(keyset, operands, options)


def _record_jvp(keyset: Any, operands: Operands, options: Options) -> Any:
    """`forward_jvp` of tensors without tangents."""
    if requires_grad(operands):
        return _record(FORWARD_JVP, keyset, operands, options)
    return _redispatch(FORWARD_JVP, keyset, (*operands, *options))


def _record(operator: Operator, keyset: Any, operands: PlainOperands | Operands, options: Options) -> Any:
    """The results of a forward operator, of tensors without tangents of which one requires a gradient."""
    fwd_grad = _torch.is_fwd_grad_enabled()
    return record(
        operator, lambda tensors: _redispatch_in_node(operator, keyset, (*tensors, *options), fwd_grad), operands,
        Gradients(options),
    )  # fmt: skip


def record(
    operator: Operator, below: Callable[[Sequence[Maybe]], Any], tensors: Sequence[Maybe], gradients: Gradients
) -> Any:
    """The same, computed by `below` from the tensors, with its node."""
    return apply(_Forward if operator is FORWARD else _ForwardJvp, below, gradients, *tensors)


def _backward_kernel(operator: Operator) -> Callable[..., Any]:
    def kernel(keyset, *args):  # type: ignore[no-untyped-def]
        if _may_be_dual() and _has_tangent(args):
            raise second_order(operator.handle.name())  # mutate: raise second_order operator
        if requires_grad(args):
            *others, wanted = args
            return apply(_Backward, operator, keyset, _torch.is_fwd_grad_enabled(), wanted, *others)
        return _redispatch(operator, keyset, args)

    return kernel


def _check_mask(mask: Maybe) -> None:
    """A mask has no derivative, at this level either."""
    if mask is None or not mask.is_floating_point():  # mutate: if mask mask
        return
    if requires_grad((mask,)):
        raise UnsupportedError("attn_mask: expected a mask that needs no gradient, got one that requires a gradient")
    if _may_be_dual() and _has_tangent((mask,)):  # mutate: if _may_be_dual _has_tangent
        raise UnsupportedError("attn_mask: expected a mask without a tangent, got one that has a tangent")


def _without_autocast(operator: Operator, key: str) -> Callable[..., Any]:
    """attention casts its arguments itself; products inside an operator must keep the type that the backend chose."""
    autocast = _torch.keyset(key)

    def kernel(*args):  # type: ignore[no-untyped-def]
        with _torch.ExcludeDispatchKeyGuard(autocast):
            return operator.handle(*args)

    return kernel


_KERNELS: dict[Operator, Callable[..., Any]] = {
    FORWARD: _forward, FORWARD_JVP: _forward_jvp,
    BACKWARD: _backward_kernel(BACKWARD), BACKWARD_JVP: _backward_kernel(BACKWARD_JVP),
}  # fmt: skip
for _operator in OPERATORS:
    library.impl(_operator.name, _KERNELS[_operator], "Autograd", with_keyset=True)
    for _key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(_operator.name, _without_autocast(_operator, _key), _key)
