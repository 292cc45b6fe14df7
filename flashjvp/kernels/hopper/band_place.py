"""Which rows the programs of a window, or of packed sequences, compute, and which ones these see.

Key n is visible to query m if low <= n - m <= high. Packed sequences lie one after the other in the rows of a single
batch entry. To a program they are entries of a batch, each as long as all of them together: there is one that ends
where row e starts, for every e (descriptors.py). A sequence is the last rows of the entry that ends where it does, so
TMA copies zeros from beyond its end and stores nothing there. The last query and the last key of each sequence are the
last rows of entries: causal masking, which aligns them, is the same difference of rows for all sequences.

`cu` has the cumulated lengths of queries, and after them those of keys, 2 (B + 1) numbers for B sequences, or is None
for a window. Sequence b has the blocks of 128 rows from cu[b] // 128 + b on, at least as many as it needs.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .blocks import CONSUMER_ROWS, Block, Loop, key_block, query_block
from .pipeline import ENTRIES

BLOCK_ROWS = gl.constexpr(128)  # of a program
AT_ONCE = gl.constexpr(128)  # sequences that are looked at


class Band(NamedTuple):
    """Row r of the resident side sees rows r + low to r + high of the streamed side."""

    entry: Any  # their batch entry
    first: Any  # of the rows that there are
    end: Any  # until before which
    low: Any
    high: Any
    number: Any  # of the statistics of head 0
    column: Any  # where the statistics of row `first` are


@gluon.jit
def _entry_of(cu, sequence, total):
    """The batch entry of a sequence, which ends where that does, and its first row there, of `total` rows. They stay
    inside whatever the numbers in `cu`."""
    start = gl.minimum(gl.maximum(gl.load(cu + sequence), 0), total)
    end = gl.maximum(gl.minimum(gl.load(cu + sequence + 1), total), start)  # mutate: end
    return ENTRIES - total + end, total - (end - start)  # mutate: return ENTRIES


@gluon.jit
def _find(cu, block, count):
    """Which of `count` sequences a block belongs to, and the first row of the block in it. Blocks that the sequence
    does not need start beyond its end."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([AT_ONCE // 32], [32], [4], [0])
    before = 0
    for first in range(0, count, AT_ONCE):
        b = first + gl.arange(0, AT_ONCE, LAYOUT)
        starts = gl.load(cu + b, mask=b < count, other=0) // BLOCK_ROWS + b
        before += gl.sum(((starts <= block) & (b < count)).to(gl.int32), 0)  # mutate: before
    sequence = gl.maximum(before - 1, 0)
    return sequence, (block - _first_block(cu, sequence)) * BLOCK_ROWS


@gluon.jit
def _first_block(cu, sequence):
    return gl.load(cu + sequence) // BLOCK_ROWS + sequence


@gluon.jit
def place_of_queries(cu, low, high, M, N, heads, group, KEYS: gl.constexpr):
    """The block of a program with resident queries, its loop, and the band of keys that it sees. `number` and `column`
    are the place of the queries' own statistics: `column` is that of row 0."""
    if cu is None:
        block, loop = query_block(M, N, heads, group, KEYS, True)  # the last rows first: they may see more keys
        return block, loop, Band(block.batch, 0, N, low, high, 0, 0)
    else:
        pid = gl.program_id(0)
        blocks = gl.num_programs(0) // heads
        number = blocks - 1 - pid % blocks
        count = blocks - M // BLOCK_ROWS
        sequence, row = _find(cu, number, count)
        entry, first = _entry_of(cu, sequence, M)
        of_keys, first_key = _entry_of(cu + (count + 1), sequence, N)
        end = first_key if first + row >= M else N  # blocks that no sequence needs see nothing
        head = pid // blocks
        band = Band(of_keys, first_key, end, low, high, 0, number * BLOCK_ROWS - (first + row))
        return Block(entry, head, first + row), Loop(head // group, 1, 0, 0, heads), band


@gluon.jit
def place_of_keys(cu, low, high, M, N, heads, group, ROWS: gl.constexpr, CONSUMERS: gl.constexpr = 2):
    """The block of a program with resident keys, 64 for each of CONSUMERS, its loop over the heads of a group, and the
    band of queries that it sees, up to the end of the last tile: rows beyond the last query are zeros, and add
    nothing."""
    if cu is None:
        block, loop = key_block(M, N, heads, group, ROWS, False, CONSUMERS)
        band = Band(block.batch, 0, loop.end * ROWS, -high, -low, block.batch * heads, 0)  # mutate: band
        return block, loop, band
    else:
        kv_heads = heads // group
        pid = gl.program_id(0)
        programs = gl.num_programs(0) // kv_heads  # of a head
        OF_BLOCK: gl.constexpr = 2 // CONSUMERS
        count = programs // OF_BLOCK - N // BLOCK_ROWS
        of_keys = cu + (count + 1)
        number = pid % programs
        sequence, row = _find(of_keys, number // OF_BLOCK, count)
        row += number % OF_BLOCK * (CONSUMERS * CONSUMER_ROWS)  # mutate: row
        entry, first = _entry_of(of_keys, sequence, N)
        of_queries, first_query = _entry_of(cu, sequence, M)
        column = _first_block(cu, sequence) * BLOCK_ROWS  # mutate: column
        end = first_query + gl.cdiv(M - first_query, ROWS) * ROWS
        end = first_query if first + row >= N else end
        head = pid // programs
        block = Block(entry, head, first + row)
        loop = Loop(head * group, group, 0, 0, heads)
        return block, loop, Band(of_queries, first_query, end, -high, -low, 0, column)


@gluon.jit
def moved(pointer, block, heads, shift, columns):
    """A pointer to numbers of [heads, columns], as it is taken for those of [batch, heads, columns]: column c of the
    block's batch entry is then column c + shift."""
    return pointer + (shift - block.batch.to(gl.int64) * heads * columns)  # mutate: return pointer
