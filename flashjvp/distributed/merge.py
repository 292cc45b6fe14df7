"""Partial results over disjoint sets of keys, merged as they come, and sums of partial gradients.

MATH.md (8) of two parts: with the mass w = exp(lse_i - lse) of the new part i, and lse that of both,

    mu  <- mu + w * (mu_i - mu)
    O_t <- O_t + w * (O_t_i - O_t) + w * (1 - w) * (mu_i - mu) * (O_i - O)
    O   <- O + w * (O_i - O)
"""

import torch
from torch import Tensor

from ..layout import STATISTIC_DTYPE, empty_lse, is_additive, rows

Maybe = Tensor | None


class Merge:
    """o, o_t, lse and mu over the keys seen so far, with half types in float32.

    A row that has seen no key has zeros, and lse = -inf. Without a JVP o_t and mu are zeros.
    """

    def __init__(self, q: Tensor, v: Tensor, mask: Maybe) -> None:
        kind = STATISTIC_DTYPE[q.dtype]
        self._q = q
        self._is_additive = is_additive(mask)
        self._o = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=kind)
        self._o_t = torch.zeros_like(self._o)
        self._mu = q.new_zeros(q.shape[:-1], dtype=kind)
        self._lse = empty_lse(q, mask).fill_(-torch.inf)

    def add(self, part: slice, o: Tensor, lse: Tensor, o_t: Maybe = None, mu: Maybe = None) -> None:
        """What some of the rows got from further keys."""
        sum_o, sum_o_t, sum_mu, sum_lse = (self._rows(x, part) for x in (self._o, self._o_t, self._mu, self._lse))
        w = self._merge_lse(sum_lse, lse)[..., None]
        apart = o - sum_o
        if o_t is not None and mu is not None:
            moved = mu - sum_mu
            sum_o_t.lerp_(o_t.to(sum_o_t.dtype), w)
            # mutate: sum_o_t
            sum_o_t.addcmul_(apart, w * (1 - w) * moved[..., None])
            sum_mu.addcmul_(w[..., 0], moved)  # mutate: sum_mu
        sum_o.addcmul_(apart, w)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """o, o_t, lse and mu, as a backend gives them."""
        return rows(self._o, self._q), rows(self._o_t, self._q), self._lse, self._mu

    def _rows(self, x: Tensor, part: slice) -> Tensor:
        return x.narrow(self._q.ndim - 2, part.start, part.stop - part.start)

    def _merge_lse(self, lse: Tensor, new: Tensor) -> Tensor:
        """The mass of the new keys; `lse` becomes that of all. Of an additive mask, it is a pair (layout.py)."""
        if not self._is_additive:
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
