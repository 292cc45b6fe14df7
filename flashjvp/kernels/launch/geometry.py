"""What the sizes and the strides of a call's tensors say about its kernels: computed once, then looked up."""

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from ..tiles import odd
from . import schedule
from .argument import LONG, Special, special


class Sizes(NamedTuple):
    """What every kernel takes of the sizes of a call."""

    queries: int
    keys: int
    heads: int  # of queries
    group: int  # query heads of a key head


class Geometry(NamedTuple):
    """What the sizes of q, k and v say about a call."""

    sizes: Sizes
    kv_heads: int
    programs: int  # the product of the batch dims
    batch_shape: tuple[int, ...]  # of odd sizes, from last to first
    k_columns: tuple[int, ...]
    v_columns: tuple[int, ...]
    width: int  # the larger head dim, padded: schedule.padded_width
    is_empty: bool  # nothing to launch: no query, or no key to see
    special: object  # what Triton compiles for


class Layout(NamedTuple):
    """What the strides, the width and the type of a tensor say about an Operand."""

    strides: tuple[int, ...]  # of the Operand
    bits: int  # that any stride but the column's has
    is_regular: bool  # rows start at multiples of 16 bytes, and 32 bits hold the offsets in a tile
    special: Special


@lru_cache(1 << 14)
def geometry(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], precision: str) -> Geometry:
    """Of the shapes of q, k and v."""
    *batch, heads, m, d = q
    kv_heads, n, dv = k[-3], k[-2], v[-1]
    batch_shape = tuple(odd(size) for size in reversed(batch)) or (odd(1),)
    programs = 1
    for size in batch:
        programs *= size
    sizes = Sizes(m, n, heads, heads // max(kv_heads, 1))
    k_columns = (d, *schedule.chunk_widths(d, precision))
    v_columns = (dv, *schedule.chunk_widths(dv, precision))
    width = schedule.padded_width(max(d, dv))
    compiled_for = _token(precision, k_columns, v_columns, sizes.group == 1, *_long((*batch_shape, *sizes)))
    is_empty = programs * heads * m * n * d == 0
    return Geometry(sizes, kv_heads, programs, batch_shape, k_columns, v_columns, width, is_empty, compiled_for)


@lru_cache(1 << 14)
def layout(strides: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """Of [*batch, head, row, column] strides; without batch dims, one of 0."""
    *batch, head, row, _ = strides
    # mutate: packed
    packed = (row, odd(head), *(map(odd, reversed(batch)) if batch else (odd(0),)))
    bits = 0
    for stride in strides[:-1]:
        bits |= stride
    is_regular = bits * dtype.itemsize % 16 == 0 and row < 1 << 23
    return Layout(packed, bits, is_regular, special(dtype, len(packed), False, any(_long(packed))))


def in_one_chunk(columns: tuple[int, ...]) -> tuple[int, int]:
    """A head dim with one chunk of at least 64 columns, which rows that start anywhere need: with Triton 3.6 products
    of chunks of 16 or 32 are wrong there (docs/hopper.md)."""
    width, *_ = columns
    return width, max(64, 1 << (width - 1).bit_length())


@cache
def _token(*what: object) -> object:
    """Stands for `what` in the keys of compiled kernels, cheap to hash. There are few, unlike sizes and strides."""
    return object()


def _long(integers: tuple[int, ...]) -> tuple[bool, ...]:
    """Which integers need 64 bits, and so their number."""
    return tuple([x >= LONG for x in integers])
