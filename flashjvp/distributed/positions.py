"""Which positions of a sequence each rank holds, and which blocks of attention two shards make: arithmetic alone.

A span is a `range` of positions. A shard is a list of spans in rising order; its rows lie in memory in that order.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

Spans = tuple[range, ...]


class Block(NamedTuple):
    """One call of attention: rows of the local queries, rows of a shard of keys, and whether it is causal.

    A causal one is aligned at the top left, as `flashjvp.attention` is.
    """

    rows: slice
    keys: slice
    is_causal: bool


def chunks(length: int, parts: int) -> list[range]:
    """`length` positions in `parts` chunks, as `torch.chunk` and DTensor cut: all of one size, but for the last ones.

    These may be shorter, or empty.
    """
    size = -(-length // parts)
    return [range(min(i * size, length), min((i + 1) * size, length)) for i in range(parts)]


def neighbours(sizes: Sequence[int]) -> list[range]:
    """Ranges of these sizes, one after the other."""
    ends = list(itertools.accumulate(sizes))
    return [range(end - length, end) for end, length in zip(ends, sizes, strict=True)]


def shards(length: int, ranks: int, zigzag: bool) -> list[Spans]:
    """The spans of each rank of a ring.

    With zigzag, rank r holds chunks r and 2 * ranks - 1 - r of 2 * ranks chunks: an early one with little work under a
    causal mask, and a late one with much.
    """
    if not zigzag:
        return [_joined([span]) for span in chunks(length, ranks)]
    halves = chunks(length, 2 * ranks)
    return [_joined([halves[r], halves[-1 - r]]) for r in range(ranks)]


def size(spans: Spans) -> int:
    """The number of positions."""
    return sum(map(len, spans))


def part(spans: Spans, rows: range) -> Spans:
    """The positions of a range of a shard's rows."""
    return _joined([span[cut.start : cut.stop] for span, cut in zip(spans, _cuts(spans, rows), strict=True)])


def blocks(queries: Spans, keys: Spans, is_causal: bool) -> list[Block]:
    """The calls that give attention of the queries over the keys. Query m sees keys n <= m if it is causal.

    Few large ones: one for a shard with itself, and one for two shards of a zig-zag.
    """
    if not queries or not keys:
        return []
    whole = Block(slice(0, size(queries)), slice(0, size(keys)), is_causal)
    if not is_causal or queries == keys:
        return [whole]
    found: list[Block] = []
    first_row = 0
    for rows in queries:
        first_key = 0
        for columns in keys:
            found += _block_of_spans(rows, columns, first_row, first_key)
            first_key += len(columns)
        first_row += len(rows)
    return _merged(_merged(found, by_rows=True), by_rows=False)


def _block_of_spans(rows: range, keys: range, first_row: int, first_key: int) -> list[Block]:
    """What a causal mask leaves of two spans whose first ones are local rows `first_row` and `first_key`.

    Rows before `start` see none of these keys. All others see the keys before it, and those from it on causally.
    """
    start = max(rows.start, keys.start)
    if start >= rows.stop:
        return []
    # mutate: seen_by
    seen_by = slice(first_row + start - rows.start, first_row + len(rows))
    middle, end = min(start, keys.stop), min(rows.stop, keys.stop)
    full = slice(first_key, first_key + middle - keys.start)
    # mutate: rest
    rest = slice(full.stop, first_key + end - keys.start)
    found = [Block(seen_by, full, False), Block(seen_by, rest, True)]
    return [block for block in found if block.keys.start < block.keys.stop]


def _merged(found: Sequence[Block], by_rows: bool) -> list[Block]:
    """Blocks of neighbouring keys of the same rows in one, or of neighbouring rows with the same keys; none causal."""
    done: list[Block] = []
    for block in found:
        for i, other in enumerate(done):
            if block.is_causal or other.is_causal:
                continue
            if by_rows and block.rows == other.rows and block.keys.start == other.keys.stop:
                done[i] = Block(block.rows, slice(other.keys.start, block.keys.stop), False)
                break
            if not by_rows and block.keys == other.keys and block.rows.start == other.rows.stop:
                done[i] = Block(slice(other.rows.start, block.rows.stop), block.keys, False)
                break
        else:
            done.append(block)
    return done


def _joined(spans: Sequence[range]) -> Spans:
    """Without empty spans, and neighbours in one."""
    found: list[range] = []
    for span in spans:
        if len(span) and found and found[-1].stop == span.start:
            found[-1] = range(found[-1].start, span.stop)
        elif len(span):
            found.append(span)
    return tuple(found)


def _cuts(spans: Spans, rows: range) -> list[range]:
    """For each span, which of its positions a range of the shard's rows takes."""
    cuts, first = [], 0
    for span in spans:
        start, stop = (min(max(row - first, 0), len(span)) for row in (rows.start, rows.stop))
        cuts.append(range(start, stop))
        first += len(span)
    return cuts
