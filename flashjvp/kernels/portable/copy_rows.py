"""Copies rows into tensors that are padded with zeros, or out of such."""

from collections.abc import Iterable
from itertools import groupby

import triton
import triton.language as tl
from torch import Tensor

from ..launch.call import Call
from ..tiles import load_rows, select_head, store_rows

_NUMBERS = 2048  # of each tensor that a program copies
_TENSORS = 4


@triton.jit
def _load(
    x, first, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BROADCAST: tl.constexpr, REGULAR: tl.constexpr
):  # fmt: skip
    if BROADCAST:
        (column,) = load_rows(x, first, rows, ROWS, (1, 1), REGULAR)
        exists = tl.arange(0, COLUMNS[1])[None, :] < COLUMNS[0]
        return (tl.where(exists, column, 0.0).to(column.dtype),)
    else:
        return load_rows(x, first, rows, ROWS, COLUMNS, REGULAR)


@triton.jit
def _copy(
    x, out, batch, head, batch_shape, first, rows,
    COLUMNS: tl.constexpr, TO_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BROADCAST: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    if x is not None:
        # mutate: tile
        tile = _load(select_head(x, batch, head, batch_shape, REGULAR), first, rows, ROWS, COLUMNS, BROADCAST, REGULAR)
        store_rows(select_head(out, batch, head, batch_shape, REGULAR), tile, first, rows, TO_COLUMNS, REGULAR)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def copy_rows_kernel(
    x0, x1, x2, x3, out0, out1, out2, out3, scale, batch_shape, M, N, heads, group,
    COLUMNS: tl.constexpr, TO_COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BROADCAST: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one head of each tensor. Columns that it does not have are zeros in the copy. With
    BROADCAST its first one stands for all of them."""
    rows = N if KEYS else M
    heads = heads // group if KEYS else heads
    tiles = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    batch, head, first = pid // tiles // heads, (pid // tiles) % heads, (pid % tiles) * ROWS
    _copy(x0, out0, batch, head, batch_shape, first, rows, COLUMNS, TO_COLUMNS, ROWS, BROADCAST, REGULAR)
    _copy(x1, out1, batch, head, batch_shape, first, rows, COLUMNS, TO_COLUMNS, ROWS, BROADCAST, REGULAR)
    _copy(x2, out2, batch, head, batch_shape, first, rows, COLUMNS, TO_COLUMNS, ROWS, BROADCAST, REGULAR)
    _copy(x3, out3, batch, head, batch_shape, first, rows, COLUMNS, TO_COLUMNS, ROWS, BROADCAST, REGULAR)


def copy_rows(call: Call, pairs: Iterable[tuple[Tensor, Tensor]], keys: bool) -> None:
    """Copies the first tensor of each pair to the second one: of queries, or of keys. Where that one is wider, it gets
    zeros. The column stride of each is 1 or, of the first, 0."""
    length, heads = (call.sizes.keys, call.kv_heads) if keys else (call.sizes.queries, call.sizes.heads)
    for (width, to_width, broadcast), found in groupby(sorted(pairs, key=_kind), key=_kind):
        columns = triton.next_power_of_2(max(width, to_width))
        rows = _NUMBERS // columns
        programs = call.programs * heads * -(-length // rows)
        alike = [*found]
        for i in range(0, len(alike), _TENSORS):
            some, to = zip(*alike[i : i + _TENSORS], strict=True)
            if broadcast:
                some = tuple([x[..., :1] for x in some])
            absent = (None,) * (_TENSORS - len(some))
            args = (*call.operands(*some), *absent, *call.operands(*to), *absent)
            call.launch(
                copy_rows_kernel, "copy_rows", programs, args, 0.0, stages=1, COLUMNS=(width, columns),
                TO_COLUMNS=(to_width, columns), ROWS=rows, KEYS=keys, BROADCAST=broadcast,
            )  # fmt: skip


def _kind(pair: tuple[Tensor, Tensor]) -> tuple[int, int, bool]:
    """What a launch is of: the widths of both, and whether a column of the first one stands for all."""
    x, to = pair
    return x.shape[-1], to.shape[-1], x.stride(-1) == 0 and x.shape[-1] > 1
