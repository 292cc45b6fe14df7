"""How the tiled backend cuts a call into boxes and tiles: their sizes, and how a step reads and writes its part."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ..layout import STATISTIC_DTYPE
from . import philox
from .patterns import BLOCK, Band, Pattern

Maybe = Tensor | None
Box = tuple[slice, ...]
"""One slice for each batch dim and one for the key heads."""

CPU_TILE = (512, 2048)
"""Query rows and keys of a tile on a CPU: 4 MiB of float32, so that a workspace of four stays in the last-level cache.

A quarter of that takes about 5% less time on one thread, but four times the parallel regions on several; each region
waits for its slowest thread, and on a busy machine those waits are what takes the time.
"""
DEVICE_TILE = (1024, 4096)
"""The same on an accelerator, where the products of a smaller tile would take less time than their launches."""


@dataclass(frozen=True)
class Grid:
    """The sizes of one call and of its tiles, and how a step reads and writes its part of the operands.

    A step sees [Z, R, K] matrices. Z counts the pairs of a box; R the query rows of a tile, those of the `group` query
    heads that share a key head one after the other; K the keys of a tile. Boxes and tiles are slices, so operands,
    masks and results of any strides and any number of batch dims are read and written in place.
    lead: the batch sizes, then the number of key heads. dtype: the type of computation.
    mask, mask_t: None or [*batch, Hkv, group, M, N], any of these dims 1. seed, dropout_p: of dropout (philox.py).
    pattern: which keys a query sees (patterns.py).
    """

    lead: tuple[int, ...]
    group: int
    queries: int
    keys: int
    tile_queries: int
    tile_keys: int
    tile_pairs: int
    dtype: torch.dtype
    mask: Maybe
    is_causal: bool
    mask_t: Maybe = None
    seed: Maybe = None
    dropout_p: float = 0.0
    pattern: Pattern | None = None

    @staticmethod
    def of(
        q: Tensor, k: Tensor, mask: Maybe, is_causal: bool, mask_t: Maybe = None, seed: Maybe = None,
        dropout_p: float = 0.0, pattern: Pattern | None = None,
    ) -> "Grid":  # fmt: skip
        """The grid of q [*batch, Hq, M, D] and k [*batch, Hkv, N, D]: a short dim leaves room to others."""
        *lead, keys, width = k.shape
        group, queries = q.shape[-3] // max(lead[-1], 1), q.shape[-2]
        most_rows, most_keys = CPU_TILE if q.device.type == "cpu" else DEVICE_TILE
        room = most_rows * most_keys // max(group, 1)
        if pattern is not None and not isinstance(pattern, Band):
            most_rows = BLOCK
        is_partial = is_causal or pattern is not None
        rows_to_fill = most_rows // max(group, 1) if is_partial else room // max(width, min(keys, most_keys))
        tile_queries = _clamp(rows_to_fill, queries)
        tile_keys = _clamp(room // tile_queries, keys)
        tile_pairs = _clamp(room // tile_queries // max(width, tile_keys), math.prod(lead))
        mask, mask_t = (
            x if x is None else x.unsqueeze(-3) if x.shape[-3] == 1 else x.unflatten(-3, (lead[-1], group))
            for x in (mask, mask_t)
        )
        return Grid(
            tuple(lead), group, queries, keys, tile_queries, tile_keys, tile_pairs, STATISTIC_DTYPE[q.dtype], mask,
            is_causal, mask_t, seed, dropout_p, pattern,
        )  # fmt: skip

    def boxes(self) -> Iterator[Box]:
        """Slices of at most tile_pairs (batch, key head) pairs that cover all of them, the last dims first."""
        room, slices = self.tile_pairs, []
        for size in reversed(self.lead):
            step = _clamp(room, size)
            room //= step
            slices.append(_slices(size, step))
        return itertools.product(*reversed(slices))

    def query_tiles(self) -> list[slice]:
        return _slices(self.queries, self.tile_queries)

    def key_tiles(self, rows: slice) -> list[slice]:
        """The tiles of keys that any of the query rows may take part with."""
        if self.pattern is not None:
            runs = self.pattern.runs(rows, min(self.keys, rows.stop) if self.is_causal else self.keys)
            return [part for run in runs for part in _slices(run.stop, self.tile_keys, run.start)]
        # mutate: return _slices min
        return _slices(min(self.keys, rows.stop) if self.is_causal else self.keys, self.tile_keys)

    def workspace(self, count: int, like: Tensor) -> Tensor:
        """Memory for `count` tiles of scores at a time."""
        size = self.tile_pairs * self.group * self.tile_queries * self.tile_keys
        return like.new_empty(count, size, dtype=self.dtype)

    def tiles(self, workspace: Tensor, box: Box, rows: slice, keys: slice) -> tuple[Tensor, ...]:
        """The workspace as contiguous [Z, R, K] tiles."""
        shape = (math.prod(_lengths(box)), self.group * _length(rows), _length(keys))
        return workspace[:, : math.prod(shape)].view(len(workspace), *shape).unbind()

    def mask_(self, S: Tensor, box: Box, rows: slice, keys: slice) -> Tensor:
        """Adds the bias of (1) to a contiguous tile of scores: mask, and -inf where the key comes after the query."""
        S_heads = self._of_heads(S, box, rows, keys)
        if self.is_causal and keys.stop - 1 > rows.start:
            m = torch.arange(rows.start, rows.stop, device=S.device)
            n = torch.arange(keys.start, keys.stop, device=S.device)
            S_heads.masked_fill_(n > m[:, None], -torch.inf)
        if self.pattern is not None and (seen := self.pattern.visible(rows, keys, S.device)) is not None:
            S_heads.masked_fill_(~self._of_box(seen, box), -torch.inf)
        if self.mask is not None:
            tile = _tile_of(self.mask, box, rows, keys)
            if tile.dtype == torch.bool:
                S_heads.masked_fill_(~tile, -torch.inf)
            else:
                S_heads.add_(tile)
        return S

    def add_mask_tangent_(self, S_t: Tensor, box: Box, rows: slice, keys: slice) -> Tensor:
        """Adds the tangent of the mask to a contiguous tile of the tangents of scores; (24)."""
        if self.mask_t is not None:
            self._of_heads(S_t, box, rows, keys).add_(_tile_of(self.mask_t, box, rows, keys))
        return S_t

    def zero_mask(self, wanted: bool) -> Maybe:
        """What `add_to_mask` adds to: zeros of the mask's shape."""
        return self.mask.new_zeros(self.mask.shape, dtype=self.dtype) if wanted and self.mask is not None else None

    def add_to_mask(self, grad: Maybe, dS: Tensor, box: Box, rows: slice, keys: slice) -> None:
        """Adds a contiguous tile of (25), summed over the dims in which the mask is broadcast."""
        if grad is not None:
            tile = _tile_of(grad, box, rows, keys)
            tile.add_(self._of_heads(dS, box, rows, keys).sum_to_size(tile.shape))  # mutate: tile.add_

    def dropout(self, box: Box, rows: slice, keys: slice) -> Maybe:
        """A tile of R of (26), or None without dropout."""
        if self.seed is None:
            return None
        *batch, heads = box
        sizes = self.lead[:-1]
        seed, entry = (
            x.expand(*sizes, 1, 1, 1)[tuple(batch)].unsqueeze(-1)
            for x in philox.seeds_and_entries(self.seed, sizes)
        )  # fmt: skip
        kv_head, m, n = (torch.arange(part.start, part.stop, device=seed.device) for part in (heads, rows, keys))
        head = kv_head[:, None] * self.group + torch.arange(self.group, device=seed.device)
        kept = philox.kept(seed, entry, head[..., None, None], m[:, None], n, self.dropout_p)
        R = philox.factor(self.dropout_p) * kept.to(self.dtype)
        return R.reshape(math.prod(_lengths(box)), self.group * _length(rows), _length(keys))

    def _of_heads(self, tile: Tensor, box: Box, rows: slice, keys: slice) -> Tensor:
        """A contiguous tile [Z, R, K] by batch dims, heads, queries and keys."""
        return tile.view(*_lengths(box), self.group, _length(rows), _length(keys))

    def _of_box(self, seen: Tensor, box: Box) -> Tensor:
        """The part of [entries or 1, heads or 1, R, K] for a box, by batch dims, heads, queries and keys."""
        seen = seen.unsqueeze(-3) if seen.shape[-3] == 1 else seen.unflatten(-3, (self.lead[-1], self.group))
        seen = seen[0] if len(self.lead) == 1 else seen[(None,) * (len(self.lead) - 2)]
        return _tile_of(seen, box, slice(None), slice(None))

    @overload
    def load_keys(self, x: Tensor, box: Box) -> Tensor: ...
    @overload
    def load_keys(self, x: None, box: Box) -> None: ...
    def load_keys(self, x: Maybe, box: Box) -> Maybe:
        """x [*batch, Hkv, N, width] as [Z, N, width] of dtype, a view where type and strides allow."""
        return None if x is None else x[box].to(self.dtype).reshape(math.prod(_lengths(box)), self.keys, x.shape[-1])

    def zero_keys(self, like: Maybe, box: Box) -> Maybe:
        """Zeros of load_keys(like, box)'s shape."""
        if like is None:
            return None
        return like.new_zeros(math.prod(_lengths(box)), self.keys, like.shape[-1], dtype=self.dtype)

    def store_keys(self, out: Maybe, box: Box, value: Maybe) -> None:
        """Writes what load_keys would read."""
        if out is not None and value is not None:
            out[box] = value.view(*_lengths(box), *value.shape[1:])

    @overload
    def load_rows(self, x: Tensor, box: Box, rows: slice) -> Tensor: ...
    @overload
    def load_rows(self, x: None, box: Box, rows: slice) -> None: ...
    def load_rows(self, x: Maybe, box: Box, rows: slice) -> Maybe:
        """x [*batch, Hq, M, width] as [Z, R, width] of dtype, a view where type and strides allow."""
        if x is None:
            return None
        part = self._heads(x)[(*box, slice(None), rows)]
        return part.to(self.dtype).reshape(math.prod(_lengths(box)), self.group * _length(rows), x.shape[-1])

    def zero_rows(self, like: Maybe, box: Box, rows: slice) -> Maybe:
        """Zeros of load_rows(like, box, rows)'s shape."""
        if like is None:
            return None
        return like.new_zeros(math.prod(_lengths(box)), self.group * _length(rows), like.shape[-1], dtype=self.dtype)

    def store_rows(self, out: Maybe, box: Box, rows: slice, value: Maybe) -> None:
        """Writes what load_rows would read."""
        if out is not None and value is not None:
            shape = (*_lengths(box), self.group, _length(rows), value.shape[-1])
            self._heads(out)[(*box, slice(None), rows)] = value.view(shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-3, (self.lead[-1], self.group))


def _tile_of(mask: Tensor, box: Box, rows: slice, keys: slice) -> Tensor:
    """The part of [*batch, Hkv, group, M, N] that a tile reads or writes; dims of 1 stay whole."""
    pairs = zip(mask.shape, (*box, slice(None), rows, keys), strict=True)
    return mask[tuple(slice(None) if size == 1 else part for size, part in pairs)]


def _clamp(value: int, most: int) -> int:
    return max(1, min(value, most))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _lengths(box: Box) -> list[int]:
    return [_length(part) for part in box]


def _slices(size: int, step: int, first: int = 0) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(first, size, step)]
