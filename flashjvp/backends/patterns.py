"""Which keys a query sees, besides masks: a band of differences (windows), listed blocks, or those of its sequence;
MATH.md (33).

The backends that compute on the spot take one as their last argument. The kernels have their own (kernels/portable/
visible.py); reference and tiled ask the objects here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Queries and keys of a block of a plan (block_plan.py)."""


class Band(NamedTuple):
    """Key n is visible to query m if low <= n - m <= high."""

    low: int
    high: int

    def runs(self, rows: slice, keys: int) -> list[slice]:
        """The keys, out of so many, that any of the rows sees."""
        start, stop = max(0, rows.start + self.low), min(keys, rows.stop + self.high)
        return [slice(start, stop)] if start < stop else []

    def visible(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        """Boolean [1, 1, rows, keys], or None where all of them are visible."""
        if keys.start - rows.stop + 1 >= self.low and keys.stop - 1 - rows.start <= self.high:
            return None
        m = torch.arange(rows.start, rows.stop, device=device)
        difference = torch.arange(keys.start, keys.stop, device=device) - m[:, None]
        # mutate: return difference
        return ((difference >= self.low) & (difference <= self.high))[None, None]


class Listed(NamedTuple):
    """Stands for the blocks that the plan in the mask's place names."""


class Packed(NamedTuple):
    """Stands for the sequences whose cumulated lengths are in the mask's place."""


class Blocks:
    """The blocks of a plan, read on the host: of how many batch entries and heads, and what each of them sees."""

    def __init__(self, plan: Tensor, queries: int, keys: int) -> None:
        entries, heads, ends_at, _, bits_at, bits_end, *_ = plan[:8].tolist()
        rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
        ends = plan[ends_at : ends_at + entries * heads * rows * 2 + 1]
        row = torch.repeat_interleave(torch.arange(len(ends) - 1, device=plan.device) // 2, ends.diff() // 3)
        column, part, _ = plan[ends[0] : ends[-1]].view(-1, 3).long().unbind(1)
        self._parts = torch.full((entries * heads * rows, columns), -2, device=plan.device)  # -1: all of it
        self._parts[row, column] = part
        self._parts = self._parts.view(entries, heads, rows, columns)
        self._bits = plan[bits_at:bits_end].view(-1, BLOCK, BLOCK // 32)

    def runs(self, rows: slice, keys: int) -> list[slice]:
        """The keys, out of so many, that any of the rows sees, in blocks."""
        seen = (self._parts[:, :, _blocks(rows)] > -2).flatten(0, 2).any(0).tolist()
        found: list[slice] = []
        for column in [column for column, is_seen in enumerate(seen) if is_seen]:
            start, stop = column * BLOCK, min((column + 1) * BLOCK, keys)
            if found and found[-1].stop == start:
                start = found.pop().start
            found.append(slice(start, stop))
        return found

    def visible(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        """Boolean [entries or 1, heads or 1, rows, keys], or None where all of them are visible."""
        parts = self._parts[:, :, _blocks(rows), _blocks(keys)]
        if bool((parts == -1).all()):
            return None
        every = torch.ones(1, BLOCK, BLOCK, dtype=torch.bool, device=device)
        tiles = torch.cat([~every, every, unpacked(self._bits)])[parts + 2]  # [entries, heads, rows, columns, ...]
        whole = tiles.transpose(-2, -3).flatten(-4, -3).flatten(-2)
        return whole[..., _in_blocks(rows), _in_blocks(keys)]


Pattern = Band | Blocks


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _in_blocks(part: slice) -> slice:
    """Where the rows of a slice are in those of its blocks."""
    first = part.start // BLOCK * BLOCK
    return slice(part.start - first, part.stop - first)


def packed(tiles: Tensor) -> Tensor:
    """Boolean [T, BLOCK, BLOCK] as int32 [T, BLOCK, BLOCK / 32]: bit j of a word is its key j."""
    return _words(tiles.unflatten(-1, (-1, 32)).long() << torch.arange(32, device=tiles.device))


def packed_for_tiles(tiles: Tensor) -> Tensor:
    """Boolean [T, rows, BLOCK] as int32 [T, quarter, rows]: the words of packed masks (hopper/packed_mask.py). Of every
    8 columns, two are bits of each quarter's word."""
    bit = torch.arange(BLOCK, device=tiles.device) // 8 * 2 + torch.arange(BLOCK, device=tiles.device) % 2
    return _words((tiles.long() << bit).unflatten(-1, (16, 4, 2)).transpose(-3, -2).flatten(-2)).mT


def _words(bits: Tensor) -> Tensor:
    """The sums of int64 bits over the last dim, as words of 32 bits."""
    words = bits.sum(-1)
    return words.where(words < 2**31, words - 2**32).int()


def unpacked(bits: Tensor) -> Tensor:
    """What `packed` was given."""
    return (bits[..., None] >> torch.arange(32, dtype=torch.int32, device=bits.device) & 1).bool().flatten(-2)
