"""Partial results over disjoint sets of keys, merged as they come, and sums of partial gradients.

MATH.md (8) of two parts: with the mass w = exp(lse_i - lse) of the new part i, and lse that of both,

    mu  <- mu + w * (mu_i - mu)
    O_t <- O_t + w * (O_t_i - O_t) + w * (1 - w) * (mu_i - mu) * (O_i - O)
    O   <- O + w * (O_i - O)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import STATISTIC_DTYPE, empty_lse, is_additive, rows

Maybe = Tensor | None


class Merge:
    """o and lse, and with a JVP o_t and mu, over the keys seen so far; half types are held in float32.

    A row that has seen no key has zeros, and lse = -inf.
    """

    def __init__(self, q: Tensor, v: Tensor, mask: Maybe, jvp: bool) -> None:
        self._q, self._width, self._mask, self._jvp = q, v.shape[-1], mask, jvp
        self._merged: Sequence[Tensor] | None = None

    def add(self, part: slice, o: Tensor, lse: Tensor, *tangents: Tensor) -> None:
        """o, lse, and with a JVP o_t and mu, that some of the rows got from further keys. They may be written to."""
        kind = STATISTIC_DTYPE[self._q.dtype]
        if self._merged is None and part.stop - part.start == self._q.shape[-2]:
            self._merged = [o.to(kind), lse, *(x.to(kind) for x in tangents)]
            return
        self._merged = self._of_no_key() if self._merged is None else self._merged
        sum_o, sum_lse, *sums_of_tangents = (self._rows(x, part) for x in self._merged)
        w = self._merge_lse(sum_lse, lse)[..., None]
        apart = o - sum_o
        if self._jvp:
            (o_t, mu), (sum_o_t, sum_mu) = tangents, sums_of_tangents
            moved = (mu - sum_mu)[..., None]
            sum_o_t.lerp_(o_t.to(kind), w)
            # mutate: sum_o_t
            sum_o_t.addcmul_(apart, w * (1 - w) * moved)
            sum_mu.addcmul_(w[..., 0], moved[..., 0])  # mutate: sum_mu
        sum_o.addcmul_(apart, w)

    def results(self) -> list[Tensor]:
        """o, lse, and with a JVP o_t and mu, as a backend gives them."""
        o, lse, *of_tangents = self._of_no_key() if self._merged is None else self._merged
        if self._jvp:
            of_tangents[0] = rows(of_tangents[0], self._q)
        return [rows(o, self._q), lse, *of_tangents]

    def _of_no_key(self) -> list[Tensor]:
        q, kind = self._q, STATISTIC_DTYPE[self._q.dtype]
        o, mu = q.new_zeros(*q.shape[:-1], self._width, dtype=kind), q.new_zeros(q.shape[:-1], dtype=kind)
        lse = empty_lse(q, self._mask).fill_(-torch.inf)
        return [o, lse, torch.zeros_like(o), mu] if self._jvp else [o, lse]

    def _rows(self, x: Tensor, part: slice) -> Tensor:
        return x.narrow(self._q.ndim - 2, part.start, part.stop - part.start)

    def _merge_lse(self, lse: Tensor, new: Tensor) -> Tensor:
        """The mass of the new keys; `lse` becomes that of all. Of an additive mask, it is a pair (layout.py)."""
        if not is_additive(self._mask):
            both = torch.logaddexp(lse, new)
            w = torch.exp(new - _finite(both))
            lse.copy_(both)  # mutate: lse
            return w
        (m, log_l), (m_new, log_l_new) = lse.unbind(-1), new.unbind(-1)
        m_both = torch.maximum(m, m_new)
        known, added = (log + (top - _finite(m_both)) for log, top in ((log_l, m), (log_l_new, m_new)))
        both = torch.logaddexp(known, added)
        w = torch.exp(added - _finite(both))
        m.copy_(m_both)
        log_l.copy_(both)  # mutate: log_l
        return w


class Sum:
    """The sum of gradients that come in parts of the rows of `like`, with half types in float32."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self._total: Maybe = None

    def add(self, part: slice, grad: Tensor) -> None:
        """The gradient of some of the rows."""
        kind, length = STATISTIC_DTYPE[self.like.dtype], part.stop - part.start
        if self._total is None and length == self.like.shape[-2]:
            self._total = grad
            return
        total = self.like.new_zeros(self.like.shape, dtype=kind) if self._total is None else self._total.to(kind)
        total.narrow(-2, part.start, length).add_(grad)  # mutate: total narrow
        self._total = total

    def total(self) -> Tensor:
        """The sum, in the type of computation, or that of the only part."""
        return self.like.new_zeros(self.like.shape) if self._total is None else self._total

    def result(self) -> Tensor:
        """The sum as a backend gives the gradient of `like`."""
        return rows(self.total(), self.like)


def _finite(x: Tensor) -> Tensor:
    """x with 0 for -inf, the statistic of a row without a key."""
    return x.masked_fill(x.isneginf(), 0.0)
