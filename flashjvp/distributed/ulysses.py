"""Ulysses: attention of all rows of some heads on each rank, as a backend that is built on another one.

Each rank gives away its rows of other ranks' heads, and gets the other ranks' rows of its own heads (exchange.py). Of
these it has the whole sequence, or a ring's whole shard, which the backend below computes. The results go the way back.
The backward pass exchanges the inputs once more, which takes less memory than to keep them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..layout import is_additive, rows
from ..operands import Inputs
from .exchange import Exchange
from .local import refuse_tangent_of_mask
from .messages import Group
from .positions import neighbours

Maybe = Tensor | None


class Ulysses:
    """The four functions of a backend (backends/reference.py), without dropout and gradients of masks.

    A mask has one row: it says the same to all queries.
    """

    def __init__(self, group: Group, queries: Sequence[int], keys: Sequence[int], inner: Any) -> None:
        """queries, keys: how many rows each rank holds. inner: the backend that computes all rows."""
        self._group, self._queries, self._keys, self._inner = group, neighbours(queries), neighbours(keys), inner

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, *rest: Any) -> tuple[Tensor, Tensor]:
        """o and lse; MATH.md (1)-(3)."""
        exchange = self._exchange(q, k)
        taken = exchange.to_heads([q], [k, v], [], mask)
        calls = [self._inner.forward(*x.queries, *x.keys, x.mask, *rest) for x in exchange.pieces(taken)]
        found = exchange.to_rows(calls, {0: v.shape[-1]}, {}, {1: _last_dim_of_lse(mask)})
        return rows(found[0], q), found[1]

    def forward_jvp(
        self, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, mask_t: Maybe,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """o, o_t, lse and mu; MATH.md (1)-(7)."""
        refuse_tangent_of_mask(mask_t)
        exchange = self._exchange(q, k)
        taken = exchange.to_heads([q, q_t], [k, v, k_t, v_t], [], mask)
        calls = []
        for x in exchange.pieces(taken):
            (q_, q_t_), (k_, v_, k_t_, v_t_) = x.queries, x.keys
            calls.append(self._inner.forward_jvp(q_, k_, v_, q_t_, k_t_, v_t_, x.mask, None, *rest))
        width = v.shape[-1]
        found = exchange.to_rows(calls, {0: width, 1: width}, {}, {2: _last_dim_of_lse(mask), 3: 0})
        return rows(found[0], q), rows(found[1], q), found[2], found[3]

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Maybe, *rest: Any
    ) -> tuple[Maybe, Maybe, Maybe, Maybe]:
        """The wanted ones of d_q, d_k, d_v; MATH.md (9)-(17) with no tangent."""
        exchange = self._exchange(q, k)
        taken = exchange.to_heads([d_o, q, o], [k, v], [lse], mask)
        calls = []
        for x in exchange.pieces(taken):
            d_o_, q_, o_ = x.queries
            calls.append(self._inner.backward(d_o_, q_, *x.keys, o_, *x.statistics, x.mask, *rest))
        *_, (of_q, of_k, of_v, _) = rest
        asked = Inputs(of_q, of_k, of_v, False, False, False)
        d_q, d_k, d_v, *_ = _gradients(exchange, calls, Inputs(q, k, v), asked)
        return d_q, d_k, d_v, None

    def backward_jvp(
        self, d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
        o_t: Maybe, lse: Tensor, mu: Tensor, mask: Maybe, mask_t: Maybe, *rest: Any,
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t; MATH.md (9)-(20). A missing cotangent is zero."""
        exchange = self._exchange(q, k)
        taken = exchange.to_heads([d_o, d_o_t, q, q_t, o, o_t], [k, v, k_t, v_t], [lse, mu], mask)
        calls = []
        for x in exchange.pieces(taken):
            (d_o_, d_o_t_, q_, q_t_, o_, o_t_), (k_, v_, k_t_, v_t_) = x.queries, x.keys
            calls.append(
                self._inner.backward_jvp(
                    d_o_, d_o_t_, q_, k_, v_, q_t_, k_t_, v_t_, o_, o_t_, *x.statistics, x.mask, None, *rest
                )
            )
        *_, wanted = rest
        inputs = Inputs(q, k, v, q_t, k_t, v_t)
        asked = Inputs(*[want and x is not None for want, x in zip(wanted[:6], inputs, strict=True)])
        return *_gradients(exchange, calls, inputs, asked), None, None

    def _exchange(self, q: Tensor, k: Tensor) -> Exchange:
        return Exchange(self._group, self._queries, self._keys, q, k)


def _gradients(exchange: Exchange, calls: Sequence[Sequence[Maybe]], inputs: Inputs, wanted: Inputs) -> Inputs:
    """This rank's rows of the gradients, and None for those that are not wanted."""
    widths = {i: x.shape[-1] for i, (x, want) in enumerate(zip(inputs, wanted, strict=True)) if want}
    of_queries = {i: width for i, width in widths.items() if Inputs._fields[i] in ("q", "q_t")}
    of_keys = {i: width for i, width in widths.items() if i not in of_queries}
    found = exchange.to_rows(calls, of_queries, of_keys, {})
    return Inputs(*[rows(found[i], x) if i in found else None for i, x in enumerate(inputs)])


def _last_dim_of_lse(mask: Maybe) -> int:
    return 2 if is_additive(mask) else 0
