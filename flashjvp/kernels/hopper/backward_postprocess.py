"""Turns the accumulators of d_q and d_q_t into gradients: reorders, scales and rounds them; MATH.md (15), (18)."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import schedule
from ..launch.call import Call, Maybe
from ..tiles import scale_rows, select_head, store_rows
from .scales import D_Q, D_Q_T, SOFTMAX_SCALE


@triton.jit
def _load_transposed(dq_accum, ROWS: tl.constexpr):
    """[ROWS, 128] from an accumulator of backward_pairs.py: 64 columns of each consumer, transposed, in the order in
    which the threads of a warpgroup hold them."""
    value = tl.load(dq_accum + tl.arange(0, 128 * ROWS)).reshape((2, ROWS // 8, 4, 8, 4, 2, 2))
    return value.permute((1, 4, 6, 0, 2, 5, 3)).reshape((ROWS, 128))


@triton.jit
def _load_chunk(dq_accum, WIDTH: tl.constexpr):
    """[64, WIDTH] from an accumulator of dq_accum.py: in the order in which the threads of a warpgroup hold them."""
    value = tl.load(dq_accum + tl.arange(0, 64 * WIDTH)).reshape((WIDTH // 8, 4, 8, 4, 2, 2))
    return value.permute((1, 4, 2, 0, 3, 5)).reshape((64, WIDTH))


@triton.jit
def load_dq_accum(dq_accum, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A tile of an accumulator, as chunks of columns."""
    if TRANSPOSED:
        return (_load_transposed(dq_accum, ROWS),)
    elif REST == 0:
        return (_load_chunk(dq_accum, FIRST),)
    else:
        return _load_chunk(dq_accum, FIRST), _load_chunk(dq_accum + 64 * FIRST, REST)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def postprocess_kernel(
    dq_accum, dq_t_accum, d_q, d_q_t, tensor_scales, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, ROWS: tl.constexpr, DQ_COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: d_q and d_q_t of a tile of rows of one head, from the accumulators of d_q / c and d_q_t / c."""
    tiles = tl.cdiv(M, ROWS)
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    batch = pid // tiles // heads
    m0 = (pid % tiles) * ROWS
    FIRST: tl.constexpr = K_COLUMNS[1]
    REST: tl.constexpr = DQ_COLUMNS - FIRST
    COLUMNS: tl.constexpr = (K_COLUMNS[0], FIRST, REST) if REST > 0 else K_COLUMNS
    first = pid.to(tl.int64) * (ROWS * (FIRST + REST))
    factor = tl.full([ROWS], scale, tl.float32)
    factor_t = factor
    if tensor_scales is not None:
        softmax_scale = tl.load(tensor_scales + SOFTMAX_SCALE)
        factor = tl.full([ROWS], softmax_scale * tl.load(tensor_scales + D_Q), tl.float32)
        # mutate: factor_t
        factor_t = tl.full([ROWS], softmax_scale * tl.load(tensor_scales + D_Q_T), tl.float32)
    if d_q is not None:
        value = scale_rows(load_dq_accum(dq_accum + first, ROWS, FIRST, REST, TRANSPOSED), factor)
        store_rows(select_head(d_q, batch, head, batch_shape, REGULAR), value, m0, M, COLUMNS, REGULAR)
    if d_q_t is not None:
        # mutate: value_t
        value_t = scale_rows(load_dq_accum(dq_t_accum + first, ROWS, FIRST, REST, TRANSPOSED), factor_t)
        store_rows(select_head(d_q_t, batch, head, batch_shape, REGULAR), value_t, m0, M, COLUMNS, REGULAR)


def dq_columns(call: Call) -> int:
    """Columns of the accumulators: the padded head dim, less half of its second chunk where that is padding."""
    first, *rest = schedule.pipeline_chunks(call.width)
    d, *_ = call.k_columns
    return call.width - rest[0] // 2 if rest and d <= first + rest[0] // 2 else call.width


def launch_postprocess(
    call: Call, dq_accum: tuple[Tensor, Tensor], d_q: Maybe, d_q_t: Maybe, tensor_scales: Maybe, scale: float,
    transposed: bool,
) -> None:  # fmt: skip
    """Writes d_q and d_q_t from accumulators [tiles, columns * rows]; those of backward_pairs.py are `transposed`."""
    of_d_q, _ = dq_accum
    args = (*dq_accum, *call.operands(d_q, d_q_t), tensor_scales)
    columns = dq_columns(call)
    rows = of_d_q.shape[-1] // columns
    d, *_ = call.k_columns
    padded = (d, *schedule.pipeline_chunks(call.width))
    tile: dict[str, Any] = {"stages": 1, "ROWS": rows, "DQ_COLUMNS": columns, "K_COLUMNS": padded}
    tile["TRANSPOSED"] = transposed
    call.launch(postprocess_kernel, "backward_postprocess", call.query_programs(rows), args, scale, **tile)
