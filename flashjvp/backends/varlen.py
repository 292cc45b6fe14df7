"""Packed sequences as a backend that is built on another one. The cumulated lengths come in the place of the mask.

The operators, their derivatives and the rules of transforms are those of one call: all that they need to know is in the
shapes of q, k and v. Rows are [*batch, H, total, D], and `cu` is int32 [2, B + 1], the cumulated lengths of queries and
those of keys. Under causal masking the last query of a sequence is aligned with its last key.
"""

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentValueError, UnsupportedError
from ..layout import STATISTIC_DTYPE, zero_rows
from ..operands import Inputs
from . import select

Maybe = Tensor | None


class _Sequence(NamedTuple):
    """Which rows a sequence has, and the mask that aligns its last query with its last key."""

    queries: slice
    keys: slice
    mask: Maybe
    is_causal: bool


class Varlen:
    """The four functions of a backend (backends/reference.py), without masks and dropout.

    triton has kernels for them. The others compute one sequence after the other, and read `cu` on the host.
    """

    def __init__(self, local: str | None) -> None:
        """local: the name of what computes; None is the best for a device and type."""
        self._local = local

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, seed: Maybe, is_causal: bool, scale: float, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """o and lse."""
        local, cu = self._chosen(q, v), _one_for_all(cu)
        if (kernels := _kernels(local)) is not None:
            results: tuple[Tensor, Tensor] = kernels.forward(q, k, v, cu, seed, is_causal, scale, dropout_p)
            return results
        o, _, lse, _ = self.forward_jvp(q, k, v, None, None, None, cu, None, seed, is_causal, scale, dropout_p)
        return o, lse

    def forward_jvp(
        self, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, cu: Tensor, cu_t: None, seed: Maybe,
        is_causal: bool, scale: float, dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """o, o_t, lse and mu."""
        local, cu = self._chosen(q, v), _one_for_all(cu)
        if (kernels := _kernels(local)) is not None:
            results: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.forward_jvp(
                q, k, v, q_t, k_t, v_t, cu, None, seed, is_causal, scale, dropout_p
            )
            return results
        o, o_t = zero_rows(q, v.shape[-1]), zero_rows(q, v.shape[-1])
        lse = q.new_zeros(q.shape[:-1], dtype=STATISTIC_DTYPE[q.dtype])
        mu = torch.zeros_like(lse)
        for one in _sequences(cu, q, is_causal):
            if one.keys.start == one.keys.stop:
                lse[..., one.queries] = -torch.inf
                continue
            x = _of(one, Inputs(q, k, v, q_t, k_t, v_t))
            results = local.forward_jvp(*x, one.mask, None, None, one.is_causal, scale, 0.0)
            o[..., one.queries, :], o_t[..., one.queries, :], lse[..., one.queries], mu[..., one.queries] = results
        return o, o_t, lse, mu

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, seed: Maybe,
        is_causal: bool, scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool],
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, and None."""
        local, cu = self._chosen(q, v), _one_for_all(cu)
        if (kernels := _kernels(local)) is not None:
            grads: tuple[Maybe, ...] = kernels.backward(
                d_o, q, k, v, o, lse, cu, seed, is_causal, scale, dropout_p, wanted
            )
            return grads
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
        local, cu = self._chosen(q, v), _one_for_all(cu)
        if (kernels := _kernels(local)) is not None:
            found: tuple[Maybe, ...] = kernels.backward_jvp(
                d_o, d_o_t, q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, cu, None, seed, is_causal, scale, dropout_p, wanted
            )
            return found
        given = Inputs(q, k, v, q_t, k_t, v_t)
        of_inputs = wanted[: len(given)]
        grads = [
            zero_rows(x, x.shape[-1]) if x is not None and want else None
            for x, want in zip(given, of_inputs, strict=True)
        ]
        for one in _sequences(cu, q, is_causal):
            if one.keys.start == one.keys.stop:
                continue
            of_o, of_o_t, o_b, o_t_b = (None if x is None else x[..., one.queries, :] for x in (d_o, d_o_t, o, o_t))
            parts = local.backward_jvp(
                of_o, of_o_t, *_of(one, given), o_b, o_t_b, lse[..., one.queries], mu[..., one.queries], one.mask,
                None, None, one.is_causal, scale, 0.0, (*of_inputs, False, False),
            )  # fmt: skip
            for name, grad, part in zip(Inputs._fields, grads, parts, strict=False):
                if grad is not None:
                    grad[..., one.queries if name in ("q", "q_t") else one.keys, :] = part
        return *grads, None, None

    def _chosen(self, q: Tensor, v: Tensor) -> ModuleType:
        return select.resolve(self._local, q.device, q.dtype, select.is_wide(q, v))


def _kernels(local: ModuleType) -> Any:
    """The functions with kernels of their own, where triton computes."""
    if not local.__name__.endswith(".triton"):
        return None
    from . import triton_varlen

    return triton_varlen


def _one_for_all(cu: Tensor) -> Tensor:
    """The cumulated lengths without the leading dims that vmap gives them."""
    if cu.ndim > 2 and any(size != 1 for size in cu.shape[:-2]):
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


def name_of(local: str | None) -> str:
    """The name by which operators find these functions."""
    return f"varlen:{local or 'best'}"


for _local in (None, *select.NAMES):
    select.COMPOSED[name_of(_local)] = Varlen(_local)
