"""Packed sequences on the triton backend: the launches of kernels/portable/varlen.py for each operator.

Rows that belong to no sequence get zeros: nobody can tell on the host whether there are any.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.launch.call import Call
from ..kernels.launch.replay import captured
from ..kernels.portable.backward_preprocess import launch_preprocess
from ..kernels.portable.varlen import Sequences
from ..layout import STATISTIC_DTYPE
from ..operands import (
    Inputs,
    PlainVarlenBackwardOperands,
    PlainVarlenOperands,
    VarlenBackwardOperands,
    VarlenOperands,
)

Maybe = Tensor | None


@captured(PlainVarlenOperands)
def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """o and lse."""
    o, _, lse, _ = _forward(Inputs(q, k, v), cu_q, cu_k, is_causal, scale, jvp=False)
    return o, lse


@captured(VarlenOperands)
def varlen_forward_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, cu_q: Tensor, cu_k: Tensor, is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, o_t, lse and mu."""
    o, o_t, lse, mu = _forward(Inputs(q, k, v, q_t, k_t, v_t), cu_q, cu_k, is_causal, scale, jvp=True)
    assert o_t is not None and mu is not None
    return o, o_t, lse, mu


def _forward(
    x: Inputs, cu_q: Tensor, cu_k: Tensor, is_causal: bool, scale: float, jvp: bool
) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    total, heads, _ = x.q.shape
    o = x.q.new_zeros(total, heads, x.v.shape[-1])
    lse = x.q.new_zeros(heads, total, dtype=STATISTIC_DTYPE[x.q.dtype])
    o_t, mu = (torch.zeros_like(o), torch.zeros_like(lse)) if jvp else (None, None)
    heads_first = Inputs._make(map(_heads_first, x))
    call = Call(heads_first.q, heads_first.k, heads_first.v, None, is_causal)
    if not call.is_empty:
        Sequences(call, cu_q, cu_k).forward(heads_first, (_heads_first(o), _heads_first(o_t), lse, mu), scale)
    return o, o_t, lse, mu


@captured(PlainVarlenBackwardOperands)
def varlen_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, is_causal: bool,
    scale: float, wanted: tuple[bool, bool, bool],
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v."""
    d_q, d_k, d_v, _, _, _ = varlen_backward_jvp(
        d_o, None, q, k, v, None, None, None, o, None, lse, None, cu_q, cu_k, is_causal, scale,
        (*wanted, False, False, False),
    )  # fmt: skip
    return d_q, d_k, d_v


@captured(VarlenBackwardOperands)
def varlen_backward_jvp(
    d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
    o_t: Maybe, lse: Tensor, mu: Maybe, cu_q: Tensor, cu_k: Tensor, is_causal: bool, scale: float,
    wanted: tuple[bool, ...],
) -> tuple[Maybe, ...]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t. Without a cotangent of o_t those of tangents are zero."""
    given = Inputs(q, k, v, q_t, k_t, v_t)
    grads = Inputs(*[torch.zeros_like(x) if x is not None and want else None
                     for x, want in zip(given, wanted, strict=True)])  # fmt: skip
    x = Inputs._make(map(_heads_first, given if d_o_t is not None else Inputs(q, k, v)))
    call = Call(x.q, x.k, x.v, None, is_causal)
    if call.is_empty:
        return grads
    into = Inputs._make(map(_heads_first, grads if d_o_t is not None else Inputs(grads.q, grads.k, grads.v)))
    cotangents = _heads_first(d_o), _heads_first(d_o_t)
    row_a, row_delta = launch_preprocess(call, x.q, *cotangents, _heads_first(o), _heads_first(o_t))
    statistics = (lse, None if d_o_t is None else mu, row_a, row_delta)
    sequences = Sequences(call, cu_q, cu_k)
    if into.q is not None or into.q_t is not None:
        sequences.query_gradients(x, cotangents, (into.q, into.q_t), statistics, scale)
    sequences.key_gradients(x, cotangents, (into.k, into.v, into.k_t, into.v_t), statistics, scale)
    return grads


def _heads_first(x: Any) -> Any:
    """Rows [total, H, D] as the kernels take them, [1, H, total, D]."""
    return None if x is None else x.transpose(0, 1).unsqueeze(0)
