"""Packed sequences as a backend that is built on another one. The cumulated lengths come in the place of the mask.

The operators, their derivatives and the rules of transforms are those of one call: all that they need to know is in the
shapes of q, k and v. Tensors are [*batch, total, H, D], as users have them: a call then views nothing, and records no
view. `cu` is int32 [2, B + 1], the cumulated lengths of queries and those of keys. Under causal masking the last query
of a sequence is aligned with its last key. There are no masks and no dropout.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentValueError, UnsupportedError
from ..layout import STATISTIC_DTYPE, zero_rows
from ..operands import RECORDS, Inputs
from . import select
from .rows_first import rows_first

Maybe = Tensor | None


class _Sequence(NamedTuple):
    """Which rows a sequence has, and the mask that aligns its last query with its last key."""

    queries: slice
    keys: slice
    mask: Maybe
    is_causal: bool


def of_tensors(local: str, q: Tensor, v: Tensor) -> Any:
    """What has the four functions of a backend (reference.py) for tensors like q and v: on triton with kernels."""
    module = select.resolve(None if local == "best" else local, q.device, q.dtype, select.is_wide(q, v))
    if not module.__name__.endswith(".triton"):
        return _one_by_one(module)
    from . import triton_varlen

    return triton_varlen


@cache
def _one_by_one(local: ModuleType) -> Any:
    functions = _OneByOne(local)
    return SimpleNamespace(**{name: rows_first(of)(getattr(functions, name)) for name, of in RECORDS.items()})


class _OneByOne:
    """One sequence after the other, on a backend without kernels for them, which reads `cu` on the host. Tensors are
    [*batch, H, total, D] here."""

    def __init__(self, local: ModuleType) -> None:
        self._local = local

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, seed: Maybe, is_causal: bool, scale: float, dropout_p: float
    ) -> tuple[Maybe, ...]:
        """o and lse."""
        o, _, lse, _ = self.forward_jvp(q, k, v, None, None, None, cu, None, seed, is_causal, scale, dropout_p)
        return o, lse

    def forward_jvp(
        self, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, cu: Tensor, cu_t: None, seed: Maybe,
        is_causal: bool, scale: float, dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """o, o_t, lse and mu."""
        o, o_t = zero_rows(q, v.shape[-1]), zero_rows(q, v.shape[-1])
        lse = q.new_zeros(q.shape[:-1], dtype=STATISTIC_DTYPE[q.dtype])
        mu = torch.zeros_like(lse)
        for one in _sequences(one_for_all(cu), q, is_causal):
            if one.keys.start == one.keys.stop:
                lse[..., one.queries] = -torch.inf
                continue
            x = _of(one, Inputs(q, k, v, q_t, k_t, v_t))
            results = self._local.forward_jvp(*x, one.mask, None, None, one.is_causal, scale, 0.0)
            o[..., one.queries, :], o_t[..., one.queries, :], lse[..., one.queries], mu[..., one.queries] = results
        return o, o_t, lse, mu

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, seed: Maybe,
        is_causal: bool, scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool],
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, and None."""
        of_q, of_k, of_v, _ = wanted
        d_q, d_k, d_v, *_ = self.backward_jvp(
            d_o, None, q, k, v, None, None, None, o, None, lse, torch.zeros_like(lse), cu, None, seed, is_causal,
            scale, dropout_p, (of_q, of_k, of_v, False, False, False, False, False),
        )  # fmt: skip
        return d_q, d_k, d_v, None

    def backward_jvp(
        self, d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
        o_t: Maybe, lse: Tensor, mu: Tensor, cu: Tensor, cu_t: None, seed: Maybe, is_causal: bool, scale: float,
        dropout_p: float, wanted: tuple[bool, ...],
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, and None twice."""
        given = Inputs(q, k, v, q_t, k_t, v_t)
        of_inputs = wanted[: len(given)]
        grads = [
            zero_rows(x, x.shape[-1]) if x is not None and want else None
            for x, want in zip(given, of_inputs, strict=True)
        ]
        for one in _sequences(one_for_all(cu), q, is_causal):
            if one.keys.start == one.keys.stop:
                continue
            of_o, of_o_t, o_b, o_t_b = (None if x is None else x[..., one.queries, :] for x in (d_o, d_o_t, o, o_t))
            parts = self._local.backward_jvp(
                of_o, of_o_t, *_of(one, given), o_b, o_t_b, lse[..., one.queries], mu[..., one.queries], one.mask,
                None, None, one.is_causal, scale, 0.0, (*of_inputs, False, False),
            )  # fmt: skip
            for name, grad, part in zip(Inputs._fields, grads, parts, strict=False):
                if grad is not None:
                    grad[..., one.queries if name in ("q", "q_t") else one.keys, :] = part
        return *grads, None, None


def one_for_all(cu: Tensor) -> Tensor:
    """The cumulated lengths without the leading dims that vmap gives them."""
    if any(size != 1 for size in cu.shape[:-2]):
        raise UnsupportedError(
            f"cu_q: expected the same lengths for all entries of a mapped dim, got shape {list(cu.shape[:-2])} of them"
        )
    return cu.view(cu.shape[-2:])


def _sequences(cu: Tensor, q: Tensor, is_causal: bool) -> Iterator[_Sequence]:
    of_q, of_k = cu.tolist()
    for name, ends in (("cu_q", of_q), ("cu_k", of_k)):  # a compiled call was not checked
        if ends[0] != 0 or any(end < start for start, end in itertools.pairwise(ends)):
            raise ArgumentValueError(f"{name}: expected cumulated lengths that start at 0, got {ends}")
    for b in range(len(of_q) - 1):
        rows, columns = of_q[b + 1] - of_q[b], of_k[b + 1] - of_k[b]
        if rows == 0:
            continue
        mask = None
        if is_causal and columns and rows not in (1, columns):  # a single query is the last one, and sees every key
            # mutate: mask
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
            mask = mask.view((1,) * (q.ndim - 2) + mask.shape)
        yield _Sequence(slice(of_q[b], of_q[b + 1]), slice(of_k[b], of_k[b + 1]), mask, is_causal and rows == columns)


def _of(one: _Sequence, x: Inputs) -> Inputs:
    """The rows of a sequence."""
    places = (one.queries, one.keys, one.keys) * 2
    return Inputs._make(None if t is None else t[..., rows, :] for t, rows in zip(x, places, strict=True))


def name_of(local: Any) -> Any:
    """The name by which operators find these functions. What is no name of a backend stays as it is, for checks.py."""
    if local is None:
        return "varlen:best"
    return f"varlen:{local}" if isinstance(local, str) else local


select.FAMILIES_BY_TENSORS["varlen"] = of_tensors
