"""Dropout: outputs and all gradients, against dense attention in float64 that drops the same probabilities.

Which ones are dropped is read off a call of the same seed whose values are one-hot.
"""

from dataclasses import replace

import torch
from torch import Tensor

import flashjvp

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Subject, differentiate

RATE = 0.25
SEED = 1234


def dropped(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A call with dropout is softmax(S) * Z / (1 - p) @ v and its derivatives, Z drawn once.

    The bound is that of a call without dropout on values that are 1 / (1 - p) times as large.
    """
    if inputs.q.numel() == 0 or inputs.k.shape[-2] == 0:
        return []
    call = replace(inputs, mask=None)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return flashjvp.attention(
            q, k, v, None, RATE, call.is_causal, call.scale, q.shape[-3] != k.shape[-3], backend=subject.backend
        )

    Z = _kept(call).double() / (1 - RATE)
    keep = torch.ones(Z.shape[-2:], dtype=torch.bool, device=Z.device)
    keep = keep.tril() if call.is_causal else keep
    heads = call.q.shape[-3] // call.k.shape[-3]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads, dim=-3) for x in (k, v))
        S = (call.c * (q @ k.mT)).masked_fill(~keep, -torch.inf)
        return (S.softmax(-1) * Z) @ v

    found, exact = differentiate(attention, call), differentiate(dense, call.map(lambda x: x.double()))
    larger = replace(call, v=call.v / (1 - RATE), v_t=None if call.v_t is None else call.v_t / (1 - RATE))
    return tolerance.same_results(found, exact, larger)


def _kept(call: Inputs) -> Tensor:
    """Which probabilities a call of this seed keeps: boolean [*batch, Hq, M, N]."""
    n = call.k.shape[-2]
    torch.manual_seed(SEED)
    q = torch.zeros(*call.q.shape[:-1], 1, device=call.q.device)
    k = torch.zeros(*call.q.shape[:-2], n, 1, device=call.q.device)
    v = torch.eye(n, device=call.q.device).expand(*call.q.shape[:-2], n, n)
    return flashjvp.attention(q, k, v, dropout_p=RATE, backend="reference") > 0
