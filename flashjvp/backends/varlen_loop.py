"""Packed sequences one after the other, by the functions of a backend for one call: what tiled and reference do."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import STATISTIC_DTYPE
from ..operands import Inputs

Maybe = Tensor | None


class _Sequence(NamedTuple):
    """Which rows a sequence has, and the mask that aligns its last query with its last key."""

    queries: slice
    keys: slice
    mask: Maybe
    is_causal: bool


class Varlen:
    """The four functions of packed sequences. Each reads the cumulated lengths, which waits for the device."""

    def __init__(self, forward_jvp: Callable[..., Any], backward_jvp: Callable[..., Any]) -> None:
        self._forward_jvp, self._backward_jvp = forward_jvp, backward_jvp

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """o and lse."""
        o, _, lse, _ = self.forward_jvp(q, k, v, None, None, None, cu_q, cu_k, is_causal, scale)
        return o, lse

    def forward_jvp(
        self, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, cu_q: Tensor, cu_k: Tensor,
        is_causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """o, o_t, lse and mu."""
        total, heads, _ = q.shape
        o = q.new_zeros(total, heads, v.shape[-1])
        lse = q.new_zeros(heads, total, dtype=STATISTIC_DTYPE[q.dtype])
        o_t, mu = torch.zeros_like(o), torch.zeros_like(lse)
        for one in _sequences(cu_q, cu_k, q, is_causal):
            if one.keys.start == one.keys.stop:
                lse[:, one.queries] = -torch.inf
                continue
            x = _of(one, Inputs(q, k, v, q_t, k_t, v_t))
            results = self._forward_jvp(*x, one.mask, None, None, one.is_causal, scale, 0.0)
            for out, result in zip((o, o_t), results, strict=False):
                out[one.queries] = _rows_first(result)
            lse[:, one.queries], mu[:, one.queries] = results[2:]
        return o, o_t, lse, mu

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
        is_causal: bool, scale: float, wanted: tuple[bool, bool, bool],
    ) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v."""
        d_q, d_k, d_v, _, _, _ = self.backward_jvp(
            d_o, None, q, k, v, None, None, None, o, None, lse, torch.zeros_like(lse), cu_q, cu_k, is_causal, scale,
            (*wanted, False, False, False),
        )  # fmt: skip
        return d_q, d_k, d_v

    def backward_jvp(
        self, d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
        o_t: Maybe, lse: Tensor, mu: Tensor, cu_q: Tensor, cu_k: Tensor, is_causal: bool, scale: float,
        wanted: tuple[bool, ...],
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t."""
        given = Inputs(q, k, v, q_t, k_t, v_t)
        grads = [torch.zeros_like(x) if x is not None and want else None
                 for x, want in zip(given, wanted, strict=True)]  # fmt: skip
        for one in _sequences(cu_q, cu_k, q, is_causal):
            if one.keys.start == one.keys.stop:
                continue
            rows = [None if x is None else _heads_first(x[one.queries]) for x in (d_o, d_o_t, o, o_t)]
            found = self._backward_jvp(
                *rows[:2], *_of(one, given), *rows[2:], lse[:, one.queries], mu[:, one.queries], one.mask, None, None,
                one.is_causal, scale, 0.0, (*wanted, False, False),
            )  # fmt: skip
            for i, (grad, part) in enumerate(zip(grads, found, strict=False)):
                if grad is not None:
                    grad[one.queries if i % 3 == 0 else one.keys] = _rows_first(part)
        return tuple(grads)


def _sequences(cu_q: Tensor, cu_k: Tensor, q: Tensor, is_causal: bool) -> Iterator[_Sequence]:
    of_q, of_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(of_q) - 1):
        queries, keys = slice(of_q[b], of_q[b + 1]), slice(of_k[b], of_k[b + 1])
        rows, columns = of_q[b + 1] - of_q[b], of_k[b + 1] - of_k[b]
        if rows == 0:
            continue
        mask = None
        if is_causal and columns and rows not in (1, columns):  # a single query is the last one, and sees every key
            mask = torch.ones(1, rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        yield _Sequence(queries, keys, mask, is_causal and rows == columns)


def _of(one: _Sequence, x: Inputs) -> Inputs:
    """The rows of a sequence, [H, rows, D]."""
    places = (one.queries, one.keys, one.keys) * 2
    return Inputs._make(None if t is None else _heads_first(t[rows]) for t, rows in zip(x, places, strict=True))


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _rows_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)
