"""Gradients of an additive mask and of its tangent; MATH.md (13), (14), summed over what the mask is broadcast in (25).

A program owns a tile of the mask as it is stored, of one row or one column where M or N is broadcast, and loops over
the scores that are summed into it: heads, batch entries, queries, keys. So nothing of the scores' size is written that
the mask does not have, no program adds to the tile of another, and two runs give the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_bias
from ...operands import Inputs
from ..launch.call import Call, Maybe
from ..tiles import from_odd, load_operand, select_head
from .backward_tile import load_lse, load_statistic, probabilities, score_gradients
from .dropout import kept_tile, select_seed
from .visible import in_band


@triton.jit
def _batch_of(own, summed, batch_shape, OWNS: tl.constexpr):
    """The batch entry from the number of an entry of the mask and of one of those that are summed into it."""
    batch = 0
    step = 1
    for i in tl.static_range(len(batch_shape)):
        size = from_odd(batch_shape[i])
        if OWNS[2 + i]:
            batch += (own % size) * step
            own = own // size
        else:
            batch += (summed % size) * step
            summed = summed // size
        step *= size
    return batch


@triton.jit
def _sizes_of(batch_shape, OWNS: tl.constexpr):
    """How many batch entries the mask has, and how many are summed into each."""
    own = 1
    summed = 1
    for i in tl.static_range(len(batch_shape)):
        if OWNS[2 + i]:
            own *= from_odd(batch_shape[i])
        else:
            summed *= from_odd(batch_shape[i])
    return own, summed


@triton.jit
def _store(grad, total, batch, head, batch_shape, m0, n0, M, N, OWNS: tl.constexpr, MASK_LAYOUT: tl.constexpr):
    """Writes a tile of the mask, summed over its rows or columns where it has one."""
    COLUMN_STRIDE: tl.constexpr = MASK_LAYOUT[0]
    HAS_ROWS: tl.constexpr = OWNS[0]
    first, row_stride = select_head(grad, batch, head, batch_shape, False)
    row = tl.arange(0, total.shape[0])[:, None]
    column = tl.arange(0, total.shape[1])[None, :]
    if not HAS_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        row = tl.zeros([1, 1], tl.int32)
    if COLUMN_STRIDE == 0:
        total = tl.sum(total, 1, keep_dims=True)
        column = tl.zeros([1, 1], tl.int32)
    pointers = first + (row + m0).to(tl.int64) * row_stride + (column + n0) * COLUMN_STRIDE
    tl.store(pointers, total.to(first.dtype.element_ty), mask=(row < M - m0) & (column < N - n0))


@triton.jit
def _rows_of(
    x, batch, head, batch_shape, start, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REGULAR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head_rows = select_head(x, batch, head, batch_shape, REGULAR)
    return load_operand(head_rows, start, end, ROWS, COLUMNS, REGULAR, PRECISION)


@triton.jit
def bias_tile(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_mask, d_mask_t, lse, mu, row_a, row_delta, scale,
    batch_shape, band, M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, OWNS: tl.constexpr,
    PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the tile of the mask that is this program's. OWNS: which of its dims are not broadcast:
    rows, heads, batch from the last. `band` is (), or the differences n - m of visible.py."""
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    _, summed_batches = _sizes_of(batch_shape, OWNS)
    pid = tl.program_id(0)
    own_n = 0
    own_m = 0
    own_head = 0
    summed_n = n_tiles
    summed_m = m_tiles
    summed_heads = heads
    if MASK_LAYOUT[0] == 1:
        own_n = pid % n_tiles
        pid = pid // n_tiles
        summed_n = 1
    if OWNS[0]:
        own_m = pid % m_tiles
        pid = pid // m_tiles
        summed_m = 1
    if OWNS[1]:
        own_head = pid % heads
        pid = pid // heads
        summed_heads = 1
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_t = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(summed_batches * summed_heads * summed_m * summed_n):  # mutate: for i range
        n0 = (own_n + i % summed_n) * BLOCK_N
        m0 = (own_m + i // summed_n % summed_m) * BLOCK_M
        head = own_head + i // summed_n // summed_m % summed_heads
        batch = _batch_of(pid, i // summed_n // summed_m // summed_heads, batch_shape, OWNS)
        # Nothing but zeros where all keys come after all queries, or outside of the band.
        if (not CAUSAL or n0 < m0 + BLOCK_M) and in_band(band, m0, n0, BLOCK_M, BLOCK_N):
            kv_head = head // group
            q_rows = _rows_of(q, batch, head, batch_shape, m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION)
            q_t_rows = _rows_of(q_t, batch, head, batch_shape, m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION)
            k_rows = _rows_of(k, batch, kv_head, batch_shape, n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION)
            k_t_rows = _rows_of(k_t, batch, kv_head, batch_shape, n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION)
            # Rows beyond M load as zeros, and so do their statistics: what they add is zero.
            base, rows = (batch.to(tl.int64) * heads + head) * M + m0, row
            inside = row < M - m0
            p = probabilities(
                q_rows, k_rows, q_t_rows, k_t_rows, load_lse(lse, base, rows, inside, MASK_LAYOUT[2]),
                load_statistic(mu, base, rows, inside), select_head(mask, batch, head, batch_shape, False),
                select_head(mask_t, batch, head, batch_shape, False), scale, m0, n0, row[:, None], column[None, :],
                M, N, True, band, False, MASK_LAYOUT, True, CAUSAL, PRECISION,
            )  # fmt: skip
            v_rows = _rows_of(v, batch, kv_head, batch_shape, n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION)
            v_t_rows = _rows_of(v_t, batch, kv_head, batch_shape, n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION)
            G = _rows_of(d_o, batch, head, batch_shape, m0, M, BLOCK_M, V_COLUMNS, REGULAR, PRECISION)
            T = _rows_of(d_o_t, batch, head, batch_shape, m0, M, BLOCK_M, V_COLUMNS, REGULAR, PRECISION)
            drop = select_seed(seed, batch, head, batch_shape, DROPOUT)
            kept = kept_tile(drop, m0, n0, row[:, None], column[None, :])
            ds = score_gradients(
                p, v_rows, v_t_rows, G, T, load_statistic(row_a, base, rows, inside),
                load_statistic(row_delta, base, rows, inside), kept, False, PRECISION,
            )  # fmt: skip
            if d_mask is not None:
                total += ds[0]  # mutate: total
            if d_mask_t is not None:
                total_t += ds[1]
    batch = _batch_of(pid, 0, batch_shape, OWNS)
    m0 = own_m * BLOCK_M
    n0 = own_n * BLOCK_N
    if d_mask is not None:
        _store(d_mask, total, batch, own_head, batch_shape, m0, n0, M, N, OWNS, MASK_LAYOUT)
    if d_mask_t is not None:
        _store(d_mask_t, total_t, batch, own_head, batch_shape, m0, n0, M, N, OWNS, MASK_LAYOUT)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def backward_bias_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_mask, d_mask_t, lse, mu, row_a, row_delta, scale,
    batch_shape, M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, OWNS: tl.constexpr,
    PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the mask."""
    bias_tile(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_mask, d_mask_t, lse, mu, row_a, row_delta, scale,
        batch_shape, (), M, N, heads, group, K_COLUMNS, V_COLUMNS, TILE, CAUSAL, MASK_LAYOUT, DROPOUT, OWNS, PRECISION,
        REGULAR,
    )  # fmt: skip


def launch_backward_bias(
    call: Call, inputs: Inputs, cotangents: tuple[Maybe, Maybe], statistics: tuple[Maybe, ...], scale: float,
    mask: Tensor, wanted: tuple[bool, bool], kernel: object = backward_bias_kernel,
) -> tuple[Maybe, Maybe]:  # fmt: skip
    """The wanted ones of d_mask and d_mask_t. `statistics` are lse, mu, row_a, row_delta."""
    d_mask, d_mask_t = (empty_bias(mask) if want else None for want in wanted)
    *batch, heads, queries, keys = mask.shape
    owns = (queries > 1, heads > 1, *([size > 1 for size in reversed(batch)] or [False]))
    tile = call.tile("backward_bias")
    programs = mask.numel() // (queries * keys) * -(-queries // tile.block_m) * -(-keys // tile.block_n)
    args = (
        *call.operands(*inputs, *cotangents), call.mask, call.mask_t, call.seed, call.bias_operand(d_mask),
        call.bias_operand(d_mask_t), *statistics, *call.plan,
    )  # fmt: skip
    call.launch(
        kernel, call.family("backward_bias"), programs, args, scale, warps=tile.warps, stages=tile.stages,
        TILE=tile.block, OWNS=owns,
    )  # fmt: skip
    return d_mask, d_mask_t
