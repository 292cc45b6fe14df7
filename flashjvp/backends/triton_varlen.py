"""Packed sequences on the triton backend: the launches of kernels/portable/varlen.py for each operator. Its functions
take what those of varlen.py do.

Rows that belong to no sequence get zeros: nobody can tell on the host whether there are any.
"""

import torch
from torch import Tensor

from ..kernels.launch.call import Call
from ..kernels.launch.replay import captured, side_by_side
from ..kernels.portable.backward_preprocess import launch_preprocess
from ..kernels.portable.varlen import Sequences
from ..layout import STATISTIC_DTYPE, zero_rows
from ..operands import BackwardOperands, Inputs, Operands, PlainBackwardOperands, PlainOperands
from .patterns import Packed
from .rows_first import rows_first
from .triton import hopper_of, on_copies, with_zeros
from .varlen import one_for_all

Maybe = Tensor | None


@captured(PlainOperands)
@rows_first(PlainOperands)
@side_by_side
@on_copies(PlainOperands)
def forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, seed: Maybe, is_causal: bool, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """o and lse."""
    o, _, lse, _ = _forward(Inputs(q, k, v), cu, is_causal, scale, jvp=False)
    return o, lse


@captured(Operands)
@rows_first(Operands)
@side_by_side
@on_copies(Operands)
def forward_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, cu: Tensor, cu_t: None, seed: Maybe,
    is_causal: bool, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, o_t, lse and mu."""
    o, o_t, lse, mu = _forward(Inputs(q, k, v, q_t, k_t, v_t), cu, is_causal, scale, jvp=True)
    assert o_t is not None and mu is not None
    return o, o_t, lse, mu


def _forward(x: Inputs, cu: Tensor, is_causal: bool, scale: float, jvp: bool) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    cu = one_for_all(cu)
    call = Call(x.q, x.k, x.v, cu, is_causal, pattern=Packed())
    has_tangents = any(tangent is not None for tangent in (x.q_t, x.k_t, x.v_t))
    if jvp == has_tangents and (hopper := hopper_of(call, scale, x)) is not None:
        results: tuple[Tensor, Maybe, Tensor, Maybe] = hopper.forward(call, x, scale)
        return results
    o = zero_rows(x.q, x.v.shape[-1])
    lse = x.q.new_zeros(x.q.shape[:-1], dtype=STATISTIC_DTYPE[x.q.dtype])
    o_t, mu = (zero_rows(x.q, x.v.shape[-1]), torch.zeros_like(lse)) if jvp else (None, None)
    if not call.is_empty:
        Sequences(Call(x.q, x.k, x.v, None, is_causal), cu).forward(x, (o, o_t, lse, mu), scale)
    return o, o_t, lse, mu


@captured(PlainBackwardOperands)
@rows_first(PlainBackwardOperands)
@side_by_side
@on_copies(PlainBackwardOperands)
def backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, seed: Maybe, is_causal: bool,
    scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool],
) -> tuple[Maybe, Maybe, Maybe, None]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, and None."""
    of_q, of_k, of_v, _ = wanted
    asked = Inputs(of_q, of_k, of_v, False, False, False)
    d_q, d_k, d_v, *_ = _backward(Inputs(q, k, v), (d_o, None), (o, None, lse, None), cu, is_causal, scale, asked)
    return d_q, d_k, d_v, None


@captured(BackwardOperands)
@rows_first(BackwardOperands)
@side_by_side
@on_copies(BackwardOperands)
def backward_jvp(
    d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
    o_t: Maybe, lse: Tensor, mu: Maybe, cu: Tensor, cu_t: None, seed: Maybe, is_causal: bool, scale: float,
    dropout_p: float, wanted: tuple[bool, ...],
) -> tuple[Maybe, ...]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, and None twice.

    Without a cotangent of o_t those of tangents are zero.
    """
    given = Inputs(q, k, v, q_t, k_t, v_t)
    asked = Inputs(*[want and one is not None for want, one in zip(wanted[:6], given, strict=True)])
    return *_backward(given, (d_o, d_o_t), (o, o_t, lse, mu), cu, is_causal, scale, asked), None, None


def _backward(
    given: Inputs, cotangents: tuple[Maybe, Maybe], results: tuple[Tensor, Maybe, Tensor, Maybe], cu: Tensor,
    is_causal: bool, scale: float, asked: Inputs,
) -> tuple[Maybe, ...]:  # fmt: skip
    """The gradients that are asked for."""
    (q, k, v, *_), (d_o, d_o_t), (o, o_t, lse, mu), cu = given, cotangents, results, one_for_all(cu)
    x = given if d_o_t is not None else Inputs(q, k, v)
    call = Call(q, k, v, cu, is_causal, pattern=Packed())
    computed = asked if d_o_t is not None else Inputs(asked.q, asked.k, asked.v, False, False, False)
    if any(computed) and (hopper := hopper_of(call, scale, x, d_o, d_o_t)) is not None:
        found: tuple[Maybe, ...] = hopper.backward(call, x, cotangents, results, scale, computed)
        return found if d_o_t is not None else with_zeros(found, given, asked)
    grads = Inputs._make([
        zero_rows(x, x.shape[-1]) if want else None for x, want in zip(given, asked, strict=True)
    ])  # fmt: skip
    if not call.is_empty:
        call = Call(q, k, v, None, is_causal)
        into = grads if d_o_t is not None else Inputs(grads.q, grads.k, grads.v)
        row_a, row_delta = launch_preprocess(call, q, d_o, d_o_t, o, o_t)
        statistics = (lse, None if d_o_t is None else mu, row_a, row_delta)  # mutate: statistics
        sequences = Sequences(call, cu)
        if into.q is not None or into.q_t is not None:
            sequences.query_gradients(x, cotangents, (into.q, into.q_t), statistics, scale)
        sequences.key_gradients(x, cotangents, (into.k, into.v, into.k_t, into.v_t), statistics, scale)
    return grads
