"""The ring: attention over a sequence of which each rank holds a part, as a backend that is built on another one.

Keys and values, with their tangents, pass from rank to rank. Each rank computes the attention of its queries over the
shard that it has at the time, and merges the results. In the backward pass the same shards go round again. With the
merged o, o_t, lse and mu the gradients of a block are terms of the sums (15) to (20), so nothing else is needed of
other ranks (MATH.md, section 4); what a block adds to the gradients of a shard is sent to the shard's owner.

A message is on its way while a block is computed that does not need it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..operands import Inputs
from . import messages
from .local import Local, refuse_tangent_of_mask
from .merge import Merge, Sum
from .messages import Group, Wait
from .positions import Block, Spans, blocks, size

Maybe = Tensor | None
Shard = list[Maybe]
"""k, v, k_t and v_t of one rank's keys."""


class Ring:
    """The four functions of a backend (backends/reference.py), without dropout and gradients of masks.

    A mask has the rows of this rank's queries, and a column for each key of the sequence.
    """

    def __init__(self, group: Group, queries: Sequence[Spans], keys: Sequence[Spans], inner: Local) -> None:
        """queries, keys: the positions that each rank holds. inner: what computes a block."""
        self._group, self._queries, self._keys, self._inner = group, queries[group.rank], keys, inner

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, seed: Maybe, is_causal: bool, scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """o and lse; MATH.md (1)-(3), (8)."""
        merge = Merge(q, v, mask, jvp=False)
        for owner, shard in self._around([k, v, None, None]):
            for block in self._blocks(owner, is_causal):
                k_n, v_n, _, _ = _keys(shard, block)
                o, lse = self._inner.forward(
                    _rows(q, block), k_n, v_n, self._mask(mask, owner, block), seed, block.is_causal, scale, dropout_p
                )
                merge.add(block.rows, o, lse)
        o, lse = merge.results()
        return o, lse

    def forward_jvp(
        self, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, mask_t: Maybe,
        seed: Maybe, is_causal: bool, scale: float, dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """o, o_t, lse and mu; MATH.md (1)-(8)."""
        refuse_tangent_of_mask(mask_t)
        merge = Merge(q, v, mask, jvp=True)
        for owner, shard in self._around([k, v, k_t, v_t]):
            for block in self._blocks(owner, is_causal):
                k_n, v_n, k_t_n, v_t_n = _keys(shard, block)
                o, o_t, lse, mu = self._inner.forward_jvp(
                    _rows(q, block), k_n, v_n, _maybe_rows(q_t, block), k_t_n, v_t_n, self._mask(mask, owner, block),
                    None, seed, block.is_causal, scale, dropout_p,
                )  # fmt: skip
                merge.add(block.rows, o, lse, o_t, mu)
        o, lse, o_t, mu = merge.results()
        return o, o_t, lse, mu

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Maybe, seed: Maybe,
        is_causal: bool, scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool],
    ) -> tuple[Maybe, Maybe, Maybe, Maybe]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v; MATH.md (9)-(17) with no tangent."""
        of_q, of_k, of_v, _ = wanted

        def of_block(shard: Shard, owner: int, block: Block) -> Inputs:
            k_n, v_n, _, _ = _keys(shard, block)
            d_q, d_k, d_v, _ = self._inner.backward(
                _rows(d_o, block), _rows(q, block), k_n, v_n, _rows(o, block), _statistic(lse, q, block),
                self._mask(mask, owner, block), seed, block.is_causal, scale, dropout_p, wanted,
            )  # fmt: skip
            return Inputs(d_q, d_k, d_v)

        found = self._gradients(Inputs(q, k, v), Inputs(of_q, of_k, of_v, False, False, False), is_causal, of_block)
        return *found[:3], None

    def backward_jvp(
        self, d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
        o_t: Maybe, lse: Tensor, mu: Tensor, mask: Maybe, mask_t: Maybe, seed: Maybe, is_causal: bool, scale: float,
        dropout_p: float, wanted: tuple[bool, ...],
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t; MATH.md (9)-(20). A missing cotangent is zero."""

        def of_block(shard: Shard, owner: int, block: Block) -> Inputs:
            k_n, v_n, k_t_n, v_t_n = _keys(shard, block)
            *grads, _, _ = self._inner.backward_jvp(
                _maybe_rows(d_o, block), _maybe_rows(d_o_t, block), _rows(q, block), k_n, v_n,
                _maybe_rows(q_t, block), k_t_n, v_t_n, _rows(o, block), _maybe_rows(o_t, block),
                _statistic(lse, q, block), _statistic(mu, q, block), self._mask(mask, owner, block), None, seed,
                block.is_causal, scale, dropout_p, wanted,
            )  # fmt: skip
            return Inputs(*grads)

        inputs = Inputs(q, k, v, q_t, k_t, v_t)
        *of_inputs, _, _ = wanted
        asked = Inputs(*[want and x is not None for want, x in zip(of_inputs, inputs, strict=True)])
        return *self._gradients(inputs, asked, is_causal, of_block), None, None

    def _gradients(
        self, inputs: Inputs, wanted: Inputs, is_causal: bool, of_block: Callable[[Shard, int, Block], Inputs]
    ) -> Inputs:
        """Sums of the gradients of blocks, and None for those that are not wanted."""
        sums = Inputs(*[Sum(x) if want else None for want, x in zip(wanted, inputs, strict=True)])
        home = _Home(self._group, sums)
        for owner, shard in self._around([inputs.k, inputs.v, inputs.k_t, inputs.v_t]):
            of_keys = sums if owner == self._group.rank else home.sums_of(shard)
            for block in self._blocks(owner, is_causal):
                grads = of_block(shard, owner, block)
                for name, grad in zip(Inputs._fields, grads, strict=True):
                    of_queries = name in ("q", "q_t")
                    total = getattr(sums if of_queries else of_keys, name)
                    if total is not None:
                        total.add(block.rows if of_queries else block.keys, grad)
            if of_keys is not sums:
                home.send(owner, of_keys)
        home.wait()
        return Inputs(*[None if x is None else x.result() for x in sums])

    def _around(self, own: Shard) -> Iterator[tuple[int, Shard]]:
        """Every rank's shard of keys with the rank, this one's first. The next one is on its way meanwhile."""
        group, shard, owner = self._group, own, self._group.rank
        present = [x for x in own if x is not None]
        sent = messages.packed(present, present[0]) if group.size > 1 else None
        for step in range(1, group.size + 1):
            if sent is None or step == group.size:
                yield owner, shard
                return
            source = (group.rank - step) % group.size  # mutate: source
            shapes = [(*x.shape[:-2], size(self._keys[source]), x.shape[-1]) for x in present]
            received = messages.buffer(shapes, present[0])
            wait = group.shift(sent, received, by=1)
            yield owner, shard
            wait()
            tensors = iter(messages.unpacked(received, shapes))
            sent, owner, shard = received, source, [None if x is None else next(tensors) for x in own]

    def _blocks(self, owner: int, is_causal: bool) -> list[Block]:
        return blocks(self._queries, self._keys[owner], is_causal)

    def _mask(self, mask: Maybe, owner: int, block: Block) -> Maybe:
        """The part of a mask that a block reads."""
        if mask is None:
            return None
        if mask.shape[-1] > 1:
            # mutate: columns
            columns = [mask[..., span.start : span.stop] for span in self._keys[owner]]
            mask = (columns[0] if len(columns) == 1 else torch.cat(columns, -1))[..., block.keys]
        return mask if mask.shape[-2] == 1 else _rows(mask, block)


class _Home:
    """What this rank adds to the gradients of other ranks' keys, on its way to them, and what others add to its own.

    A step's messages are taken in after the next step was computed.
    """

    def __init__(self, group: Group, own: Inputs) -> None:
        """own: sums of gradients, or None for those that are not wanted."""
        self._group, self._own = group, own
        self._names = [name for name in ("k", "v", "k_t", "v_t") if getattr(own, name) is not None]
        self._pending: Callable[[], None] = lambda: None

    def sums_of(self, shard: Shard) -> Inputs:
        """Empty sums for the gradients of another rank's keys."""
        of_shard = zip(("k", "v", "k_t", "v_t"), shard, strict=True)
        return Inputs(**{name: Sum(x) for name, x in of_shard if x is not None and name in self._names})

    def send(self, owner: int, sums: Inputs) -> None:
        """Starts to send the gradients of a shard to its owner. Adds those that were started before."""
        if not self._names:
            return
        like = getattr(self._own, self._names[0]).like
        shapes = [getattr(self._own, name).like.shape for name in self._names]
        sent = messages.packed([getattr(sums, name).total() for name in self._names], like)
        received = messages.buffer(shapes, like)
        # mutate: started
        started = self._group.shift(sent, received, by=owner - self._group.rank)
        self.wait()
        self._pending = lambda: self._add(started, received, shapes)

    def wait(self) -> None:
        """Adds what is still on its way."""
        self._pending()
        self._pending = lambda: None

    def _add(self, started: Wait, received: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        started()
        for name, grad in zip(self._names, messages.unpacked(received, shapes), strict=True):
            getattr(self._own, name).add(slice(0, grad.shape[-2]), grad)


def _keys(shard: Shard, block: Block) -> tuple[Tensor, Tensor, Maybe, Maybe]:
    k, v, k_t, v_t = (None if x is None else x[..., block.keys, :] for x in shard)
    if k is None or v is None:
        raise ValueError("shard: expected keys and values")
    return k, v, k_t, v_t


def _rows(x: Tensor, block: Block) -> Tensor:
    return x[..., block.rows, :]


def _maybe_rows(x: Maybe, block: Block) -> Maybe:
    return None if x is None else _rows(x, block)


def _statistic(x: Tensor, q: Tensor, block: Block) -> Tensor:
    """The part of a statistic [..., M] or [..., M, 2]."""
    return x.narrow(q.ndim - 2, block.rows.start, block.rows.stop - block.rows.start)
