"""The plan of a block mask: what kernels read in its place. One int32 tensor, made once for each BlockMask object.

    [entries, heads, at of queries' ends, at of keys' ends, at of bitmaps, 0, 0, 0]     (entries and heads may be 1)
    ends of queries   where in this tensor the list of each (entry, head, row of blocks) starts, and where the last ends
    lists of queries  (column of blocks, number of its bitmap or -1 where all of the block is visible)
    ends of keys, lists of keys     the same of each (entry, head, column), by rows
    bitmaps           a bit for each of BLOCK x BLOCK scores

Blocks are of BLOCK queries and keys, whatever those of the mask. Its function is evaluated where the mask lists blocks
that are not full, and nowhere else.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentValueError
from .patterns import BLOCK, Band, packed

HEADER = 8
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
    if band is not None:
        listed, whole = _inside(listed, whole, band)
    visible = _visibility(block_mask.mask_mod, (part, full), (size_q, size_k), band)
    bits, whole, partial = _bitmaps(visible, listed, whole, queries, keys)
    number = torch.full(listed.shape, -1, dtype=torch.int32, device=listed.device)
    number[partial] = torch.arange(len(bits), dtype=torch.int32, device=listed.device)
    return _joined(whole | partial, number, bits)


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


def _bitmaps(visible: Mask, listed: Tensor, whole: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The bitmaps of blocks that are visible in part, which blocks are visible as a whole, and which in part.

    Rows beyond the last query and key are as that one: nothing reads them.
    """
    from torch.nn.attention.flex_attention import create_mask

    places = (listed & ~whole).nonzero()
    whole, partial = whole.clone(), torch.zeros_like(whole)
    bits = [torch.empty(0, BLOCK, BLOCK // 32, dtype=torch.int32, device=listed.device)]
    for some in places.split(PARTS_AT_ONCE) if len(places) else ():
        entry, head, row, column = some.unbind(1)
        tiles = create_mask(
            _of_part(visible, some, queries, keys), len(some), 1, BLOCK, BLOCK, device=str(listed.device)
        )[:, 0]
        seen, all_seen = tiles.flatten(1).any(1), tiles.flatten(1).all(1)
        whole[entry, head, row, column] = all_seen
        partial[entry, head, row, column] = seen & ~all_seen  # mutate: partial
        bits.append(packed(tiles[seen & ~all_seen]))
    return torch.cat(bits), whole, partial


def _of_part(visible: Mask, places: Tensor, queries: int, keys: int) -> Mask:
    """Visibility by number of the block, and by query and key in it."""
    entry, head, row, column = places.unbind(1)

    def of_part(t: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        m, n = row[t] * BLOCK + i, column[t] * BLOCK + j
        return visible(entry[t], head[t], m.clamp(max=queries - 1), n.clamp(max=keys - 1))

    return of_part


def _joined(listed: Tensor, number: Tensor, bits: Tensor) -> Tensor:
    """All of it in one tensor."""
    entries, heads, rows, columns = listed.shape
    count = int(listed.sum())
    at_queries = HEADER
    at_keys = at_queries + entries * heads * rows + 1 + 2 * count
    at_bits = at_keys + entries * heads * columns + 1 + 2 * count
    if at_bits + bits.numel() >= 2**31:
        raise ArgumentValueError(f"attn_mask: expected a BlockMask of fewer partial blocks, got {len(bits)}")
    header = torch.tensor([entries, heads, at_queries, at_keys, at_bits, 0, 0, 0], dtype=torch.int32)
    of_queries = _lists(listed, number, at_queries)
    of_keys = _lists(listed.mT, number.mT, at_keys)
    return torch.cat([header.to(bits.device), *of_queries, *of_keys, bits.flatten()])


def _lists(listed: Tensor, number: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Ends and lists of the rows of [entries, heads, rows, columns], which stand from `at` on."""
    counts = listed.sum(-1).flatten()
    ends = torch.cat([counts.new_zeros(1), 2 * counts.cumsum(0)]) + at + len(counts) + 1
    *_, column = listed.nonzero(as_tuple=True)
    return ends.int(), torch.stack((column.int(), number[listed]), -1).flatten()
