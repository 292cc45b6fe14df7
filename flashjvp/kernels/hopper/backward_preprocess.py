"""The row statistics that the backward kernels here read, and what becomes of the query gradients that they add up."""

import triton
import triton.language as tl
from torch import Tensor

from ..launch.call import Call, Maybe
from ..portable.backward_preprocess import row_dot
from ..tiles import load_rows, scale_rows, select_head, store_rows
from .scales import D_Q, D_Q_T, OWN_MU, OWN_O, OWN_O_T, SHIFT, SIGMA

_ROWS = 128  # of a program that makes statistics


@triton.jit(do_not_specialize=["M", "N", "heads"])
def statistics_kernel(
    d_o, d_o_t, o, o_t, lse, mu, packed, factors, scale, batch_shape, M, N, heads, group,
    V_COLUMNS: tl.constexpr, ROWS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: lse * log2(e), mu, a and delta (11), (12) of 128 rows of one head, zeros beyond the last row.

    With `factors`, of rescaled cotangents and true results, in the units of the former; lse is then as far off as makes
    P 2^SHIFT times as large.
    """
    tiles = tl.cdiv(M, ROWS)
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    batch = pid // tiles // heads
    m0 = (pid % tiles) * ROWS
    rows = m0 + tl.arange(0, ROWS)
    number = batch.to(tl.int64) * heads + head
    place = number * (4 * ROWS * tiles) + rows

    G = load_rows(select_head(d_o, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
    o_rows = load_rows(select_head(o, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
    delta = row_dot(G, o_rows)
    if factors is not None:
        delta *= tl.load(factors + OWN_O)
    lse_rows = tl.load(lse + number * M + rows, mask=rows < M, other=0.0) * 1.4426950408889634
    if d_o_t is not None:
        T = load_rows(select_head(d_o_t, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
        o_t_rows = load_rows(select_head(o_t, batch, head, batch_shape, REGULAR), m0, M, ROWS, V_COLUMNS, REGULAR)
        delta_t = row_dot(T, o_t_rows)
        mu_rows = tl.load(mu + number * M + rows, mask=rows < M, other=0.0)
        row_a = row_dot(T, o_rows)
        if factors is not None:
            mu_rows *= tl.load(factors + OWN_MU)
            row_a *= tl.load(factors + OWN_O)
            delta_t *= tl.load(factors + OWN_O_T)
        delta += delta_t
        tl.store(packed + place + ROWS * tiles, mu_rows)
        tl.store(packed + place + 2 * ROWS * tiles, row_a)
    if factors is not None:
        lse_rows -= SHIFT
    tl.store(packed + place, lse_rows)
    tl.store(packed + place + 3 * ROWS * tiles, delta)


def launch_statistics(
    call: Call, d_o: Tensor, d_o_t: Maybe, o: Tensor, o_t: Maybe, lse: Tensor, mu: Maybe, factors: Maybe
) -> Tensor:
    """float32 [batch * heads * 4, M rounded up to 128]; without `d_o_t` two of four rows are zeros."""
    rows, heads = -(-call.sizes.queries // _ROWS) * _ROWS, call.sizes.heads
    make = lse.new_empty if d_o_t is not None else lse.new_zeros
    packed = make((call.programs * heads * 4, rows))
    args = (*call.operands(d_o, d_o_t, o, o_t), lse, mu, packed, factors)
    call.launch(statistics_kernel, "statistics", call.query_programs(_ROWS), args, 0.0, warps=8, stages=1, ROWS=_ROWS)
    return packed


@triton.jit
def _load_transposed_sums(sums, ROWS: tl.constexpr):
    """[ROWS, 128] from sums as backward_pairs.py adds them: of two consumers 64 columns each, in the order in which the
    threads of a warpgroup hold an accumulator of the transposed sums."""
    value = tl.load(sums + tl.arange(0, 128 * ROWS)).reshape((2, ROWS // 8, 4, 8, 4, 2, 2))
    return value.permute((1, 4, 6, 0, 2, 5, 3)).reshape((ROWS, 128))


@triton.jit
def _load_chunk_of_sums(sums, WIDTH: tl.constexpr):
    """[64, WIDTH] from sums as dq_accum.py adds them: in the order in which the threads of a warpgroup hold them."""
    value = tl.load(sums + tl.arange(0, 64 * WIDTH)).reshape((WIDTH // 8, 4, 8, 4, 2, 2))
    return value.permute((1, 4, 2, 0, 3, 5)).reshape((64, WIDTH))


@triton.jit
def load_sums(sums, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """A tile's sums, as chunks of columns."""
    if REST == 0:
        return (_load_transposed_sums(sums, ROWS),)
    else:
        return _load_chunk_of_sums(sums, FIRST), _load_chunk_of_sums(sums + 64 * FIRST, REST)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def query_sums_kernel(
    sums, sums_t, d_q, d_q_t, factors, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, ROWS: tl.constexpr, SUMMED: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: d_q and d_q_t of a tile of rows of one head, from their sums over scale."""
    tiles = tl.cdiv(M, ROWS)
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    batch = pid // tiles // heads
    m0 = (pid % tiles) * ROWS
    FIRST: tl.constexpr = K_COLUMNS[1]
    REST: tl.constexpr = SUMMED - FIRST
    COLUMNS: tl.constexpr = (K_COLUMNS[0], FIRST, REST) if REST > 0 else K_COLUMNS
    first = pid.to(tl.int64) * (ROWS * (FIRST + REST))
    factor = tl.full([ROWS], scale, tl.float32)
    factor_t = factor
    if factors is not None:
        sigma = tl.load(factors + SIGMA)
        factor = tl.full([ROWS], sigma * tl.load(factors + D_Q), tl.float32)
        factor_t = tl.full([ROWS], sigma * tl.load(factors + D_Q_T), tl.float32)
    value = scale_rows(load_sums(sums + first, ROWS, FIRST, REST), factor)
    store_rows(select_head(d_q, batch, head, batch_shape, REGULAR), value, m0, M, COLUMNS, REGULAR)
    value_t = scale_rows(load_sums(sums_t + first, ROWS, FIRST, REST), factor_t)
    store_rows(select_head(d_q_t, batch, head, batch_shape, REGULAR), value_t, m0, M, COLUMNS, REGULAR)


def summed_columns(call: Call) -> int:
    """Columns of the sums of query gradients: the padded head dim, but where half of its second chunk would do."""
    d, first, *rest = call.k_columns
    return call.width - rest[0] // 2 if rest and d <= first + rest[0] // 2 else call.width


def launch_query_sums(
    call: Call, sums: tuple[Tensor, Tensor], d_q: Maybe, d_q_t: Maybe, factors: Maybe, scale: float
) -> None:
    """Writes d_q and d_q_t from sums [tiles, columns * rows]."""
    d_q_sums, _ = sums
    args = (*sums, *call.operands(d_q, d_q_t), factors)
    columns = summed_columns(call)
    rows = d_q_sums.shape[-1] // columns
    programs = call.query_programs(rows)
    call.launch(query_sums_kernel, "query_sums", programs, args, scale, stages=1, ROWS=rows, SUMMED=columns)
