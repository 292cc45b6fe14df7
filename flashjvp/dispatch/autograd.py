"""Derivatives of the four operators, for reverse mode, forward mode and reverse over forward.

An Autograd-key kernel sees the tensors of one level (plain eager, or one functorch transform). It
1. splits dual inputs into primals and tangents and, where there is a tangent, calls `forward_jvp` and makes dual
   results, so that forward mode costs one launch;
2. records one autograd node when an input requires a gradient, whose backward calls the backward operator once;
3. raises SecondOrderError where an operator that is a derivative already carries a tangent, and records a node that
   raises it when one is differentiated in reverse.
It needs names that are private in PyTorch (flashjvp/_torch/); public_autograd.py serves where they are missing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch import levels
from .._torch.eager import is_marked, marked
from .._torch.levels import recorder, requires_grad
from ..errors import UnsupportedError, second_order
from ..operands import Operands, Options, PlainOperands
from .operators import prepared, without_none
from .schema import BACKWARD, BACKWARD_JVP, FORWARD, FORWARD_JVP, OPERATORS, Operator, library
from .tangents import has_tangent, in_present_level, may_be_compiled, may_be_dual, split, split_mask

Maybe = Tensor | None


def attention(operands: Operands, options: Options) -> Tensor:
    """o of canonical operands without tangents, differentiable in both modes."""
    o: Tensor
    if torch.compiler.is_compiling() or not _torch.dual_level_active():
        o = FORWARD.handle(*operands.plain, *options)[0]
        return o
    with marked("public"):
        o = FORWARD.handle(*operands.plain, *options)[0]
        return o


def attention_jvp(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """o and o_t of canonical operands, differentiable in reverse mode."""
    if not operands.has_tangents:
        o = attention(operands, options)
        return o, torch.zeros_like(o)
    o, o_t, _, _ = FORWARD_JVP.handle(*operands, *options)
    return o, o_t


# What `Operator.split` gives: the tensors, the options, and what follows them.
Split = tuple[Any, Options, tuple[Any, ...]]


def _redispatch(operator: Operator, keyset: Any, args: Split) -> Any:
    """The operator below this level's derivatives: on its backend, where nothing else is left there."""
    operands, options, wanted = args
    if not levels.is_last(keyset):
        return levels.redispatch(operator.handle, keyset, (*operands, *options, *wanted))
    with _torch.AutoDispatchBelowAutograd():
        return without_none(operator, operands, prepared(operator, *args)())


def _redispatch_in_node(operator: Operator, keyset: Any, args: Split, fwd_grad: bool) -> Any:
    """The same inside a node's forward; `fwd_grad` says whether outer levels record tangents."""
    if levels.is_last(keyset):
        return _redispatch(operator, keyset, args)
    operands, options, wanted = args
    return levels.redispatch_in_node(operator.handle, keyset, (*operands, *options, *wanted), fwd_grad)


# The nodes. `below` gives the results of a forward operator from its tensors, and `gradients` those of its node.


class Gradients:
    """The backward operator of a node, with the options of its forward."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, operator: Operator, tensors: Sequence[Maybe], wanted: tuple[bool, ...]) -> Sequence[Maybe]:
        """The gradients that are wanted, and None for the others."""
        grads = operator.handle(*tensors, *self._options, wanted)
        return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


class _Forward(levels.Node):
    @staticmethod
    def forward(ctx, below, gradients, *tensors):  # type: ignore[no-untyped-def]
        o, lse = below(tensors)
        q, k, v, mask, seed = tensors
        ctx.save_for_backward(q, k, v, o, lse, mask, seed)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, d_o, _):  # type: ignore[no-untyped-def]
        if d_o is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, *wanted, _ = ctx.needs_input_grad  # all but the seed
        # mutate: grads (1)
        grads = ctx.gradients(BACKWARD, (d_o, *ctx.saved_tensors), tuple(wanted))
        return None, None, *grads, None


class _ForwardJvp(levels.Node):
    @staticmethod
    def forward(ctx, below, gradients, *tensors):  # type: ignore[no-untyped-def]
        o, o_t, lse, mu = below(tensors)
        q, k, v, q_t, k_t, v_t, mask, mask_t, seed = tensors
        # mutate: ctx.save_for_backward
        ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, mask, mask_t, seed)
        ctx.gradients = gradients
        ctx.in_level = in_present_level() if is_marked("split") else None
        ctx.mark_non_differentiable(lse, mu)
        ctx.set_materialize_grads(False)
        return o, o_t, lse, mu

    @staticmethod
    def backward(ctx, d_o, d_o_t, *_):  # type: ignore[no-untyped-def]
        if ctx.in_level is not None and has_tangent((ctx.in_level,)):  # mutate: if ctx in_level
            raise second_order(BACKWARD_JVP.handle.name())
        if d_o is None and d_o_t is None:
            return (None,) * len(ctx.needs_input_grad)
        _, _, *wanted, _ = ctx.needs_input_grad  # mutate: _, _, *wanted, _
        # mutate: grads (2)
        grads = ctx.gradients(BACKWARD_JVP, (d_o, d_o_t, *ctx.saved_tensors), tuple(wanted))
        return None, None, *grads, None  # mutate: return grads


_NODES: dict[Operator, Any] = {FORWARD: _Forward, FORWARD_JVP: _ForwardJvp}


class _Backward(levels.Node):
    """A backward operator whose inputs require a gradient: func.grad always asks for that graph and seldom uses it."""

    @staticmethod
    def forward(ctx, operator, keyset, fwd_grad, wanted, *args):  # type: ignore[no-untyped-def]
        ctx.operator = operator
        # mutate: grads (3)
        grads = _redispatch_in_node(operator, keyset, operator.split((*args, wanted)), fwd_grad)
        ctx.mark_non_differentiable(*(grad for grad, want in zip(grads, wanted, strict=True) if not want))
        return grads

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise second_order(ctx.operator.handle.name())  # mutate: raise second_order ctx


# The Autograd-key kernels


def _forward(keyset, *args):  # type: ignore[no-untyped-def]
    operands, options, _ = FORWARD.split(args)
    if may_be_dual():
        q, k, v, mask, seed = operands
        # mutate: (q, q_t), (k, k_t), (v, v_t)
        (q, q_t), (k, k_t), (v, v_t) = split("q", q), split("k", k), split("v", v)
        mask, mask_t = split_mask(mask)
        duals = Operands(q, k, v, q_t, k_t, v_t, mask, mask_t, seed)
        if duals.has_tangents:  # mutate: if duals
            below = _untraced(_forward_of_duals) if may_be_compiled() else _forward_of_duals
            return below(keyset, duals, options)
        operands = duals.plain
    if requires_grad(operands):
        return _record(FORWARD, keyset, operands, options)
    return _redispatch(FORWARD, keyset, (operands, options, ()))


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
    if may_be_dual() and has_tangent(operands):
        raise second_order(FORWARD_JVP.handle.name())  # mutate: raise second_order FORWARD_JVP
    return _record_jvp(keyset, operands, options)


def _record_jvp(keyset: Any, operands: Operands, options: Options) -> Any:
    """`forward_jvp` of tensors without tangents."""
    if requires_grad(operands):
        return _record(FORWARD_JVP, keyset, operands, options)
    return _redispatch(FORWARD_JVP, keyset, (operands, options, ()))


def _record(operator: Operator, keyset: Any, operands: PlainOperands | Operands, options: Options) -> Any:
    """The results of a forward operator, of tensors without tangents of which one requires a gradient."""
    fwd_grad = _torch.is_fwd_grad_enabled()

    def below(tensors: Sequence[Maybe]) -> Any:
        return _redispatch_in_node(operator, keyset, (operator.operands._make(tensors), options, ()), fwd_grad)

    return recorder(_NODES[operator])(below, Gradients(options), *operands)


def recorded(
    operator: Operator, below: Callable[[Sequence[Maybe]], Any], gradients: Callable[..., Sequence[Maybe]],
    view: Callable[[Sequence[Maybe]], Sequence[Maybe]] | None,
) -> Callable[[Sequence[Maybe]], Any]:  # fmt: skip
    """A forward operator computed by `below`, as a function of the tensors of a call, with its node in grad mode.

    Not under a transform. `view` gives the tensors that the operator takes from those of the call; None where they are
    the same.
    """
    record = _NODES[operator].apply

    def run(tensors: Sequence[Maybe]) -> Any:
        if view is not None:
            tensors = view(tensors)
        if torch.is_grad_enabled():
            return record(below, gradients, *tensors)
        return below(tensors)

    return run


def _backward_kernel(operator: Operator) -> Callable[..., Any]:
    def kernel(keyset, *args):  # type: ignore[no-untyped-def]
        if may_be_dual() and has_tangent(args):
            raise second_order(operator.handle.name())  # mutate: raise second_order operator
        if requires_grad(args):
            *others, wanted = args
            return recorder(_Backward)(operator, keyset, _torch.is_fwd_grad_enabled(), wanted, *others)
        return _redispatch(operator, keyset, operator.split(args))

    return kernel


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
