"""Computes the row statistics that the backward kernels read: lse, mu, a, delta of each query; MATH.md (11), (12).

With an additive mask lse is m in nats, and there is log(l) * log2(e), a tensor of its own: layout.empty_lse.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...layout import is_additive
from ..launch.call import Maybe
from ..portable.backward_preprocess import row_dot
from ..portable.rows import select_rows
from ..portable.varlen import place, rows_of, sequence_of
from ..tiles import load_rows, select_head
from .per_tensor_scaling import KernelOperands
from .scales import INVERSE_MU, INVERSE_O, INVERSE_O_T

_ROWS = 128  # of a program that makes statistics
_LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def preprocess_kernel(
    d_o, d_o_t, o, o_t, lse, mu, stats, log_l, tensor_scales, scale, batch_shape, M, N, heads, group,
    V_COLUMNS: tl.constexpr, ROWS: tl.constexpr, REGULAR: tl.constexpr, P_EXPONENT: tl.constexpr,
):  # fmt: skip
    """One program: lse * log2(e), mu, a (11) and delta (12) of 128 rows of one head; zeros beyond the last row. A
    missing cotangent is zero.

    m is finite in a row without keys, too, and log(l) is inf beyond the last row: P is then 0, whatever the mask is.

    Under per-tensor scaling the cotangents are scaled, o, o_t and mu are not, and so are scaled here; lse is shifted so
    that P comes out 2^P_EXPONENT times as large.
    """
    tiles = tl.cdiv(M, ROWS)
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    batch = pid // tiles // heads
    m0 = (pid % tiles) * ROWS
    rows = m0 + tl.arange(0, ROWS)
    number = batch.to(tl.int64) * heads + head
    place = number * (4 * ROWS * tiles) + rows

    if d_o is not None:
        G = load_rows(select_head(d_o, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
    o_rows = load_rows(select_head(o, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
    if d_o is None:
        delta = tl.zeros([ROWS], tl.float32)
    else:
        delta = row_dot(G, o_rows)
        if tensor_scales is not None:
            delta *= tl.load(tensor_scales + INVERSE_O)  # mutate: delta (1)
    if log_l is not None:
        pair = lse + (number * M + rows) * 2
        lse_rows = tl.maximum(tl.load(pair, mask=rows < M, other=0.0), _LEAST)  # mutate: lse_rows (3)
        # mutate: log_l_rows
        log_l_rows = tl.load(pair + 1, mask=rows < M, other=float("inf")) * 1.4426950408889634
        tl.store(log_l + number * (ROWS * tiles) + rows, log_l_rows)
    else:
        # mutate: lse_rows (1)
        lse_rows = tl.load(lse + number * M + rows, mask=rows < M, other=0.0) * 1.4426950408889634
    if d_o_t is not None:
        T = load_rows(select_head(d_o_t, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
        o_t_rows = load_rows(select_head(o_t, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
        delta_t = row_dot(T, o_t_rows)
        mu_rows = tl.load(mu + number * M + rows, mask=rows < M, other=0.0)  # mutate: mu_rows
        row_a = row_dot(T, o_rows)
        if tensor_scales is not None:
            mu_rows *= tl.load(tensor_scales + INVERSE_MU)
            row_a *= tl.load(tensor_scales + INVERSE_O)  # mutate: row_a
            delta_t *= tl.load(tensor_scales + INVERSE_O_T)
        delta += delta_t  # mutate: delta (2)
        tl.store(stats + place + ROWS * tiles, mu_rows)
        tl.store(stats + place + 2 * ROWS * tiles, row_a)
    if tensor_scales is not None:
        lse_rows -= P_EXPONENT  # mutate: lse_rows (2)
    tl.store(stats + place, lse_rows)
    tl.store(stats + place + 3 * ROWS * tiles, delta)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def packed_preprocess_kernel(
    d_o, d_o_t, o, o_t, lse, mu, stats, cu, scale, batch_shape, M, N, heads, group,
    V_COLUMNS: tl.constexpr, ROWS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """Likewise of packed sequences: 128 rows of one sequence and head, in the columns of tile number `tile`. Zeros
    beyond its last row: what follows there is another one's."""
    tile, tiles, head, batch = place(batch_shape, heads)
    sequence, m0 = sequence_of(cu, tile, tiles - M // ROWS, ROWS)
    start, queries = rows_of(cu, sequence, M)
    rows = m0 + tl.arange(0, ROWS)
    exists = rows < queries
    source = head.to(tl.int64) * M + start + rows  # mutate: source
    to = stats + head.to(tl.int64) * (4 * ROWS * tiles) + (tile * ROWS + tl.arange(0, ROWS))

    o_rows = load_rows(select_rows(o, batch, head, batch_shape, start, REGULAR), m0, queries, ROWS, V_COLUMNS, REGULAR)
    delta = tl.zeros([ROWS], tl.float32)
    if d_o is not None:
        G = load_rows(select_rows(d_o, batch, head, batch_shape, start, REGULAR), m0, queries, ROWS, V_COLUMNS, REGULAR)
        delta = row_dot(G, o_rows)
    if d_o_t is not None:
        of_T = select_rows(d_o_t, batch, head, batch_shape, start, REGULAR)
        of_o_t = select_rows(o_t, batch, head, batch_shape, start, REGULAR)
        T = load_rows(of_T, m0, queries, ROWS, V_COLUMNS, REGULAR)
        delta += row_dot(T, load_rows(of_o_t, m0, queries, ROWS, V_COLUMNS, REGULAR))
        tl.store(to + ROWS * tiles, tl.load(mu + source, mask=exists, other=0.0))
        tl.store(to + 2 * ROWS * tiles, row_dot(T, o_rows))
    tl.store(to, tl.load(lse + source, mask=exists, other=0.0) * 1.4426950408889634)
    tl.store(to + 3 * ROWS * tiles, delta)


def launch_preprocess(given: KernelOperands, o: Tensor, o_t: Maybe, lse: Tensor, mu: Maybe) -> tuple[Tensor, Maybe]:
    """float32 [batch * heads * 4, M rounded up to 128], of packed sequences with the columns of their tiles; without
    `d_o_t` two of four rows are zeros. And with an additive mask log(l) * log2(e), [batch * heads, M rounded up to
    128]."""
    call, (d_o, d_o_t), tensor_scales = given.call, given.cotangents, given.tensor_scales
    rows, heads = call.tiles(call.sizes.queries, _ROWS) * _ROWS, call.sizes.heads
    make = lse.new_empty if d_o_t is not None else lse.new_zeros
    stats = make((call.programs * heads * 4, rows))
    log_l = lse.new_empty((call.programs * heads, rows)) if is_additive(call.mask_tensor) else None
    args = (*call.operands(d_o, d_o_t, o, o_t), lse, mu, stats)
    programs = call.query_programs(_ROWS)
    if call.sequences is not None:
        args = (*args, *call.plan)
        call.launch(packed_preprocess_kernel, "varlen_preprocess", programs, args, 0.0, warps=8, stages=1, ROWS=_ROWS)
        return stats, None
    args = (*args, log_l, tensor_scales)
    flags: dict[str, Any] = {"ROWS": _ROWS, "P_EXPONENT": given.p_exponent}
    call.launch(preprocess_kernel, "backward_preprocess", programs, args, 0.0, warps=8, stages=1, **flags)
    return stats, log_l
