"""The two directions of Ulysses' exchange: all heads of some rows to all rows of some heads, and back (all-to-all)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import STATISTIC_DTYPE
from . import messages
from .heads import pieces, shares
from .messages import Group

Maybe = Tensor | None
Calls = Sequence[Sequence[Maybe]]
"""The results of each call of the backend below: of one of them for each piece of this rank's heads."""


class Taken(NamedTuple):
    """Query-side and key-side tensors, statistics of queries, and a mask: of a rank's heads, or of a piece of them."""

    queries: Sequence[Any]
    keys: Sequence[Any]
    statistics: Sequence[Any]
    mask: Maybe


class Exchange:
    """The exchange of one call, whose tensors have any leading dims, then heads, rows and columns."""

    def __init__(self, group: Group, queries: Sequence[range], keys: Sequence[range], q: Tensor, k: Tensor) -> None:
        """queries, keys: which of all rows each rank holds. q, k: of this rank, with all heads."""
        self._group, self._like, self._rows = group, q, (queries, keys)
        self._ratio = q.shape[-3] // max(k.shape[-3], 1)
        self._heads = shares(q.shape[-3], k.shape[-3], group.size)
        self._kv_heads = k.shape[-3]

    def to_heads(
        self, queries: Sequence[Maybe], keys: Sequence[Maybe], statistics: Sequence[Tensor], mask: Maybe
    ) -> Taken:
        """All rows of this rank's heads."""
        sides = [0] * len(queries) + [1] * len(keys)
        tensors = self._to_heads([*queries, *keys], sides)
        columns = [x[..., None] if x.ndim < self._like.ndim else x for x in statistics]
        moved = self._to_heads(columns, [0] * len(columns))
        found = [
            y if y is None or x.ndim == self._like.ndim else y[..., 0] for x, y in zip(statistics, moved, strict=True)
        ]
        return Taken(tensors[: len(queries)], tensors[len(queries) :], found, mask)

    def pieces(self, taken: Taken) -> Iterator[Taken]:
        """The parts of this rank's heads that are calls of the backend below."""
        heads, _ = self._mine()
        for piece in pieces(heads, self._ratio):
            of_queries, of_keys = piece
            mask = taken.mask
            if mask is not None and mask.shape[-3] > 1:
                mask = mask[..., heads.start + of_queries.start : heads.start + of_queries.stop, :, :]
            dim = self._like.ndim - 3
            yield Taken(
                [None if x is None else x[..., of_queries, :, :] for x in taken.queries],
                [None if x is None else x[..., of_keys, :, :] for x in taken.keys],
                [x.narrow(dim, of_queries.start, of_queries.stop - of_queries.start) for x in taken.statistics],
                mask,
            )

    def to_rows(
        self, calls: Calls, queries: dict[int, int], keys: dict[int, int], statistics: dict[int, int]
    ) -> dict[int, Tensor]:
        """This rank's rows of all heads. The arguments give the places of results in a call, with their last dims.

        Of statistics without a last dim this is 0.
        """
        places = [*((i, width, 0) for i, width in queries.items()), *((i, width, 1) for i, width in keys.items())]
        found = self._to_rows(calls, places, self._like.dtype)
        of_rows = [(i, width, 0) for i, width in statistics.items()]
        return found | self._to_rows(calls, of_rows, STATISTIC_DTYPE[self._like.dtype])

    def _mine(self) -> list[range]:
        return [of_side[self._group.rank] for of_side in self._heads]

    def _to_heads(self, tensors: Sequence[Maybe], sides: Sequence[int]) -> list[Maybe]:
        group, present = self._group, [(x, side) for x, side in zip(tensors, sides, strict=True) if x is not None]
        if not present:
            return list(tensors)
        sent = [[_part(x, -3, self._heads[side][rank]) for x, side in present] for rank in range(group.size)]
        shapes = [
            [
                (*x.shape[:-3], len(self._mine()[side]), len(self._rows[side][rank]), x.shape[-1])
                for x, side in present
            ]
            for rank in range(group.size)
        ]  # fmt: skip
        received = messages.swap(group, sent, shapes, present[0][0])
        whole = iter([torch.cat(parts, -2) for parts in zip(*received, strict=True)])
        return [None if x is None else next(whole) for x in tensors]

    def _to_rows(self, calls: Calls, places: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> dict[int, Tensor]:
        """Results by their place in a call, from (place, last dim, side)."""
        if not places:
            return {}
        group, batch = self._group, self._like.shape[:-3]
        whole = [
            self._of_all_pieces([call[place] for call in calls], width, side, dtype) for place, width, side in places
        ]
        sent = [
            [_part(x, -2, self._rows[side][rank]) for x, (_, _, side) in zip(whole, places, strict=True)]
            for rank in range(group.size)
        ]
        shapes = [
            [
                (*batch, len(self._heads[side][rank]), len(self._rows[side][group.rank]), max(width, 1))
                for _, width, side in places
            ]
            for rank in range(group.size)
        ]  # fmt: skip
        received = messages.swap(group, sent, shapes, self._like.new_empty(0, dtype=dtype))
        found = {}
        for (place, width, side), parts in zip(places, zip(*received, strict=True), strict=True):
            x = torch.cat(parts, -3) if side == 0 else self._sum_of_keys(parts)
            found[place] = x if width else x[..., 0]
        return found

    def _of_all_pieces(self, parts: Sequence[Maybe], width: int, side: int, dtype: torch.dtype) -> Tensor:
        """One result of all calls, beside one another; of no heads where there was none."""
        length = sum(map(len, self._rows[side]))
        none = self._like.new_empty(*self._like.shape[:-3], 0, length, max(width, 1), dtype=dtype)
        return torch.cat([none, *(x if width else x[..., None] for x in parts if x is not None)], -3)

    def _sum_of_keys(self, parts: Sequence[Tensor]) -> Tensor:
        """Gradients of key heads: a head that several ranks needed has the sum of what they found."""
        of_keys = self._heads[1]
        first = parts[0]
        if sum(map(len, of_keys)) == self._kv_heads:
            return torch.cat(list(parts), -3)
        total = first.new_zeros(
            *first.shape[:-3], self._kv_heads, *first.shape[-2:], dtype=STATISTIC_DTYPE[first.dtype]
        )  # fmt: skip
        for heads, part in zip(of_keys, parts, strict=True):
            # mutate: _part
            _part(total, -3, heads).add_(part)
        return total


def _part(x: Tensor, dim: int, taken: range) -> Tensor:
    return x.narrow(dim, taken.start, len(taken))
