"""The plan of a block mask: what kernels read in its place. One int32 tensor, made once for each BlockMask object.

    [entries, heads, at of queries' ends, at of keys' ends, at of bitmaps, at of words by keys, of words by queries, 0]
                      entries and heads may be 1
    ends of queries   where in this tensor the lists of each (entry, head, row of blocks) start, that of whole blocks
                      and that of blocks with a bitmap, and where the last ends
    lists of queries  (column of blocks, number of its bitmap or -1 where all of it is visible, which quadrants are
                      visible: bit 2 i + j, if any of half i of the queries sees any of half j of the keys)
    ends of keys, lists of keys     the same of each (entry, head, column), by rows, with bit 2 j + i
    bitmaps           a bit for each of BLOCK x BLOCK scores, row by row (patterns.py)
    words             the same bits in the two layouts of hopper/packed_mask.py

Blocks are of BLOCK queries and keys, whatever those of the mask. Its function is evaluated where the mask lists blocks
that are not full, and nowhere else, but for a last column of blocks that is not full of keys: these have bitmaps, in
which keys beyond the end are not visible.
"""

import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentValueError
from .patterns import BLOCK, Band, packed, packed_for_tiles

HEADER, ENTRY = 8, 3
PARTS_AT_ONCE = 256
"""Bitmaps that one call of the mask's function computes: 32 MiB for each of its intermediate results of int64."""

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_KNOWN: weakref.WeakKeyDictionary[Any, dict[Hashable, Tensor]] = weakref.WeakKeyDictionary()


def plan_of(block_mask: Any, queries: int, keys: int, band: Band | None) -> Tensor:
    """The plan of a BlockMask over so many queries and keys, of which `band` hides what is outside of it."""
    known = _KNOWN.setdefault(block_mask, {})
    key = queries, keys, band
    if key not in known:
        with torch.inference_mode(False), torch.no_grad():
            known[key] = _made(block_mask, queries, keys, band)
    return known[key]


def _made(block_mask: Any, queries: int, keys: int, band: Band | None) -> Tensor:
    size_q, size_k = block_mask.BLOCK_SIZE
    columns = -(-keys // size_k)
    part = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    full = torch.zeros_like(part)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    of_rows = _overlap(queries, size_q, part.shape[2], part.device)
    of_columns = _overlap(keys, size_k, columns, part.device)
    listed = _any(of_rows, part | full, of_columns)
    whole = listed & ~_any(of_rows, ~full, of_columns)
    whole[..., keys // BLOCK :] = False
    if band is not None:
        listed, whole = _inside(listed, whole, band)
    visible = _visibility(block_mask.mask_mod, (part, full), (size_q, size_k), band)
    bitmaps, quadrants, whole, partial = _bitmaps(visible, listed, whole, queries, keys)
    return _joined(whole, partial, quadrants, bitmaps)


def _listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Boolean [entries, heads, rows of blocks, columns of blocks]: those that the first `counts` indices of a row
    name."""
    names = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    if bool((names & ((indices < 0) | (indices >= columns))).any()):
        raise ArgumentValueError(f"attn_mask: expected blocks below {columns}, got a BlockMask that names others")
    places = torch.where(names, indices, columns).long()
    found = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, places, True)[..., :columns]


def _overlap(length: int, size: int, blocks: int, device: torch.device) -> Tensor:
    """Float [blocks of a plan, blocks of so many rows]: 1 where they have rows in common."""
    first = torch.arange(-(-length // BLOCK), device=device)[:, None] * BLOCK
    last = (first + BLOCK).clamp(max=length) - 1
    block = torch.arange(blocks, device=device)
    return ((block >= first // size) & (block <= last // size)).float()


def _any(of_rows: Tensor, blocks: Tensor, of_columns: Tensor) -> Tensor:
    """Whether any of the blocks that a block of the plan overlaps is True."""
    return of_rows @ blocks.float() @ of_columns.mT > 0


def _inside(listed: Tensor, whole: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Which blocks have scores in the band, and which lie in it as a whole."""
    row, column = (torch.arange(size, device=listed.device) * BLOCK for size in listed.shape[-2:])
    difference = column - row[:, None]
    meets = (difference + BLOCK - 1 >= band.low) & (difference - BLOCK + 1 <= band.high)
    inside = (difference - BLOCK + 1 >= band.low) & (difference + BLOCK - 1 <= band.high)
    return listed & meets, whole & inside


def _visibility(mask_mod: Mask, blocks: tuple[Tensor, Tensor], sizes: tuple[int, int], band: Band | None) -> Mask:
    """Whether a query sees a key, as a function of batch entry, head, query and key."""
    part, full = blocks
    size_q, size_k = sizes

    def visible(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        block = b, h, m // size_q, n // size_k
        found = full[block] | (part[block] & mask_mod(b, h, m, n))
        return found if band is None else found & (n - m >= band.low) & (n - m <= band.high)

    return visible


def _bitmaps(
    visible: Mask, listed: Tensor, whole: Tensor, queries: int, keys: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Of blocks that are visible in part: bitmaps in three layouts, and of which quadrants any score is visible,
    [blocks, 2, 2]. Then which blocks are visible as a whole, and which in part.

    Rows beyond the last query are as that one: nothing reads them.
    """
    from torch.nn.attention.flex_attention import create_mask

    places = (listed & ~whole).nonzero()
    whole, partial = whole.clone(), torch.zeros_like(whole)
    made = [_of_tiles(torch.empty(0, BLOCK, BLOCK, dtype=torch.bool, device=listed.device))]
    for some in places.split(PARTS_AT_ONCE) if len(places) else ():
        entry, head, row, column = some.unbind(1)
        tiles = create_mask(
            _of_part(visible, some, queries, keys), len(some), 1, BLOCK, BLOCK, device=str(listed.device)
        )[:, 0]
        seen, all_seen = tiles.flatten(1).any(1), tiles.flatten(1).all(1)
        whole[entry, head, row, column] = all_seen
        partial[entry, head, row, column] = seen & ~all_seen  # mutate: partial
        made.append(_of_tiles(tiles[seen & ~all_seen]))
    *bitmaps, quadrants = [torch.cat(x) for x in zip(*made, strict=True)]
    return bitmaps, quadrants, whole, partial


def _of_tiles(tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bitmaps of boolean [T, BLOCK, BLOCK], and their quadrants."""
    quadrants = tiles.unflatten(2, (2, -1)).any(3).unflatten(1, (2, -1)).any(2)
    return packed(tiles), packed_for_tiles(tiles), packed_for_tiles(tiles.mT), quadrants


def _of_part(visible: Mask, places: Tensor, queries: int, keys: int) -> Mask:
    """Visibility by number of the block, and by query and key in it."""
    entry, head, row, column = places.unbind(1)

    def of_part(t: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        m, n = row[t] * BLOCK + i, column[t] * BLOCK + j
        return visible(entry[t], head[t], m.clamp(max=queries - 1), n.clamp(max=keys - 1)) & (n < keys)

    return of_part


def _joined(whole: Tensor, partial: Tensor, quadrants: Tensor, bitmaps: list[Tensor]) -> Tensor:
    """All of it in one tensor."""
    entries, heads, _, _ = whole.shape
    device, count = whole.device, len(quadrants)
    number = torch.full(whole.shape, -1, dtype=torch.int32, device=device)
    number[partial] = torch.arange(count, dtype=torch.int32, device=device)
    of_rows, of_columns = number.new_zeros(2, *whole.shape)
    of_rows[partial] = _as_bits(quadrants.flatten(1))
    of_columns[partial] = _as_bits(quadrants.mT.flatten(1))  # mutate: of_columns
    queries = _lists(whole, partial, number, of_rows)
    keys = _lists(whole.mT, partial.mT, number.mT, of_columns.mT)
    parts = [*queries, *keys, *map(torch.flatten, bitmaps)]
    at_queries, of_queries, at_keys, of_keys, *at_bits, end = itertools.accumulate(map(len, parts), initial=HEADER)
    if end >= 2**31:
        raise ArgumentValueError(f"attn_mask: expected a BlockMask of fewer partial blocks, got {count}")
    parts[0] += of_queries
    parts[2] += of_keys
    header = torch.tensor([entries, heads, at_queries, at_keys, *at_bits, 0], dtype=torch.int32)
    return torch.cat([header.to(device), *parts])


def _as_bits(seen: Tensor) -> Tensor:
    """Boolean [blocks, 4] as numbers of four bits."""
    return (seen.int() << torch.arange(4, dtype=torch.int32, device=seen.device)).sum(1, dtype=torch.int32)


def _lists(whole: Tensor, partial: Tensor, number: Tensor, quadrants: Tensor) -> tuple[Tensor, Tensor]:
    """Ends, counted from the first list on, and lists of the rows of [entries, heads, rows, columns]."""
    listed = torch.stack((whole, partial), -2)
    counts = listed.sum(-1)
    ends = torch.cat([counts.new_zeros(1), ENTRY * counts.flatten().cumsum(0)])
    place = torch.stack((whole.double().cumsum(-1), _turn(partial, quadrants)), -2)
    order = place.masked_fill(~listed, torch.inf).argsort(dim=-1, stable=True)
    first = torch.arange(listed.shape[-1], device=listed.device) < counts[..., None]
    of_each = [x[..., None, :].expand_as(order).gather(-1, order)[first] for x in (number, quadrants)]
    return ends.int(), torch.stack((order[first].int(), *of_each), -1).flatten()


def _turn(partial: Tensor, quadrants: Tensor) -> Tensor:
    """Numbers by which the partial blocks of a row are ordered: those that only the first half of the row sees, those
    that only the second half sees, and the others, evenly mixed. Each half is the work of another consumer
    (hopper/listed.py)."""
    first, second = partial & (quadrants & 12 == 0), partial & (quadrants & 3 == 0)
    turn = torch.zeros(partial.shape, dtype=torch.float64, device=partial.device)
    for some in (first, second, partial & ~first & ~second):
        turn += some * (some.cumsum(-1) - 0.5) / some.sum(-1, keepdim=True).clamp(min=1)
    return turn
