"""Copies the rows of a tensor into one that is padded with zeros, or out of such a one."""

import triton
import triton.language as tl
from torch import Tensor

from ..launch.call import Call
from ..tiles import load_rows, select_head, store_rows

_NUMBERS = 2048  # that a program copies


@triton.jit(do_not_specialize=["M", "N", "heads"])
def copy_rows_kernel(
    x, out, scale, batch_shape, M, N, heads, group,
    COLUMNS: tl.constexpr, TO_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BROADCAST: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one head. Columns that x does not have are zeros in the copy. With BROADCAST its first
    one stands for all of them."""
    tiles = tl.cdiv(M, ROWS)
    pid = tl.program_id(0)
    batch, head, first = pid // tiles // heads, (pid // tiles) % heads, (pid % tiles) * ROWS
    source = select_head(x, batch, head, batch_shape, REGULAR)
    if BROADCAST:
        (column,) = load_rows(source, first, M, ROWS, (1, 1), REGULAR)
        exists = tl.arange(0, COLUMNS[1])[None, :] < COLUMNS[0]
        tile = (tl.where(exists, column, 0.0).to(column.dtype),)
    else:
        tile = load_rows(source, first, M, ROWS, COLUMNS, REGULAR)  # mutate: tile
    store_rows(select_head(out, batch, head, batch_shape, REGULAR), tile, first, M, TO_COLUMNS, REGULAR)


def copy_rows(x: Tensor, to: Tensor) -> None:
    """Copies x [*batch, H, rows, D], or the columns of it that `to` has; further ones get zeros. The last dim of x has
    a stride of 1, or of 0."""
    width, to_width = x.shape[-1], to.shape[-1]
    columns = triton.next_power_of_2(max(width, to_width))
    broadcast = width > 1 and x.stride(-1) == 0
    call = Call(to, to, to, None, False)
    rows = _NUMBERS // columns
    args = call.operands(x[..., :1] if broadcast else x, to)
    call.launch(
        copy_rows_kernel, "copy_rows", call.query_programs(rows), args, 0.0, stages=1, COLUMNS=(width, columns),
        TO_COLUMNS=(to_width, columns), ROWS=rows, BROADCAST=broadcast,
    )  # fmt: skip
