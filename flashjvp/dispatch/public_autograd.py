"""Derivatives by public torch.autograd.Functions, for a PyTorch that lacks a private name which autograd.py needs.

Results are the same. It is slower: o and its tangent come from two Functions, because functorch runs a Function for all
of its levels at once, so a JVP takes two launches forward and two backward. torch.compile breaks its graph at these
calls: compiled, a Function under torch.func.jvp would lose its tangent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import second_order
from ..operands import Operands, Options
from .operators import mapped
from .schema import BACKWARD, BACKWARD_JVP, FORWARD, FORWARD_JVP, Operator

Maybe = Tensor | None


@torch.compiler.disable
def attention(operands: Operands, options: Options) -> Tensor:
    """o, differentiable in both modes."""
    o: Tensor = _Attention.apply(*operands.plain, (options, ()))[0]
    return o


@torch.compiler.disable
def attention_jvp(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """o and o_t, differentiable in reverse mode."""
    if not operands.has_tangents:
        o = attention(operands, options)
        return o, torch.zeros_like(o)
    o, o_t, _, _ = _AttentionJvp.apply(*operands, (options, ()))
    return o, o_t


class _Node(Function):
    """What the Functions here share: an operator, and its rule for torch.func.vmap.

    They take the operator's tensors, and at last one pair: its options, and `wanted` or nothing.
    """

    operator: Operator

    @classmethod
    def vmap(cls, info, in_dims, *args):  # type: ignore[no-untyped-def]
        *tensors, rest = args
        _, wanted = rest
        results = cls.apply(*mapped(cls.operator, info.batch_size, in_dims, tensors, wanted), rest)
        return results, tuple(0 if want else None for want in wanted or (True,) * len(results))

    @staticmethod
    def jvp(ctx, *_):  # type: ignore[no-untyped-def]
        raise second_order(ctx.name)


class _Attention(_Node):
    """(q, k, v, mask, seed, rest) -> o, lse."""

    operator = FORWARD

    @staticmethod
    def forward(q, k, v, mask, seed, rest):  # type: ignore[no-untyped-def]
        options, _ = rest
        return FORWARD.handle(q, k, v, mask, seed, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, mask, seed, ctx.rest = inputs
        o, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, o, lse, mask, seed)
        ctx.save_for_forward(q, k, v, mask, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_o, _):  # type: ignore[no-untyped-def]
        *wanted, _, _ = ctx.needs_input_grad  # all but the seed and the rest
        if d_o is None:
            return (None,) * len(ctx.needs_input_grad)
        options, _ = ctx.rest
        grads = _Backward.apply(d_o, *ctx.saved_tensors, (options, tuple(wanted)))
        return *_given(grads, wanted), None, None

    @staticmethod
    def jvp(ctx, q_t, k_t, v_t, mask_t, *_):  # type: ignore[no-untyped-def]
        q, k, v, mask, seed = ctx.saved_tensors
        o_t = None
        if not (q_t is None and k_t is None and v_t is None and mask_t is None):
            _, o_t, _, _ = _AttentionJvp.apply(q, k, v, q_t, k_t, v_t, mask, mask_t, seed, ctx.rest)
        return o_t, None


class _AttentionJvp(_Node):
    """(q, k, v, q_t, k_t, v_t, mask, mask_t, seed, rest) -> o, o_t, lse, mu."""

    operator = FORWARD_JVP

    @staticmethod
    def forward(q, k, v, q_t, k_t, v_t, mask, mask_t, seed, rest):  # type: ignore[no-untyped-def]
        options, _ = rest
        return FORWARD_JVP.handle(q, k, v, q_t, k_t, v_t, mask, mask_t, seed, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, mask, mask_t, seed, ctx.rest = inputs
        o, o_t, lse, mu = output
        ctx.name = FORWARD_JVP.handle.name()
        ctx.mark_non_differentiable(lse, mu)
        ctx.save_for_backward(*tensors, o, o_t, lse, mu, mask, mask_t, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_o, d_o_t, *_):  # type: ignore[no-untyped-def]
        *wanted, _, _ = ctx.needs_input_grad
        if d_o is None and d_o_t is None:
            return (None,) * len(ctx.needs_input_grad)
        options, _ = ctx.rest
        grads = _BackwardJvp.apply(d_o, d_o_t, *ctx.saved_tensors, (options, tuple(wanted)))
        return *_given(grads, wanted), None, None


class _Last(_Node):
    """A backward operator, which has no derivative."""

    @classmethod
    def forward(cls, *args):  # type: ignore[no-untyped-def]
        *tensors, (options, wanted) = args
        return cls.operator.handle(*tensors, *options, wanted)

    @classmethod
    def setup_context(cls, ctx, inputs, output):  # type: ignore[no-untyped-def]
        *_, (_, wanted) = inputs
        ctx.name = cls.operator.handle.name()
        ctx.mark_non_differentiable(*(x for x, want in zip(output, wanted, strict=True) if not want))

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise second_order(ctx.name)


class _Backward(_Last):
    """(d_o, q, k, v, o, lse, mask, seed, (options, wanted)) -> d_q, d_k, d_v, d_mask."""

    operator = BACKWARD


class _BackwardJvp(_Last):
    """(d_o, d_o_t, q, ..., v_t, o, o_t, lse, mu, mask, mask_t, seed, (options, wanted)) -> the eight gradients."""

    operator = BACKWARD_JVP


def _given(grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Maybe]:
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
