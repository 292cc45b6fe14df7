"""Kernels for queries that see a band or listed blocks of the keys (visible.py): the dense ones' work on these alone.

`plan` is None for a band, whose differences n - m are `low` to `high`; for blocks it is the tensor that names them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .backward_bias import backward_bias_kernel, bias_tile
from .backward_key import backward_key_kernel, key_rows
from .backward_query import backward_query_kernel, query_rows
from .forward import forward_kernel, forward_rows
from .visible import band_of_keys, band_of_queries, blocks_of_queries


@triton.jit
def _tile_of_program(rows, heads, BLOCK: tl.constexpr):
    """First row of this program's tile, its head and its batch entry."""
    tiles = (rows + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    return (pid % tiles) * BLOCK, (pid // tiles) % heads, pid // tiles // heads


@triton.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def partial_forward_kernel(
    q, k, v, q_t, k_t, v_t, mask, mask_t, seed, o, o_t, lse, mu, plan, scale, batch_shape, low, high, M, N, heads,
    group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, MASK_LAYOUT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of query rows of one head against the keys that it sees."""
    m0, head, batch = _tile_of_program(M, heads, TILE[0])
    start = 0
    if plan is None:
        start, end, full, seen = band_of_queries(low, high, m0, M, N, TILE[0], TILE[1])
    else:
        end, full, seen = blocks_of_queries(plan, batch, head, m0, M, N, TILE[1])
    forward_rows(
        q, k, v, q_t, k_t, v_t, mask, mask_t, seed, o, o_t, lse, mu, scale, batch_shape, batch, head, head // group,
        (batch.to(tl.int64) * heads + head) * M, 0, 0, m0, start, end, full, 0, seen, M, N, K_COLUMNS, V_COLUMNS, TILE,
        False, MASK_LAYOUT, DROPOUT, PRECISION, REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def partial_query_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_q, d_q_t, lse, mu, row_a, row_delta, plan, scale,
    batch_shape, low, high, M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: d_q and d_q_t of a tile of query rows of one head."""
    m0, head, batch = _tile_of_program(M, heads, TILE[0])
    start = 0
    if plan is None:
        start, end, full, seen = band_of_queries(low, high, m0, M, N, TILE[0], TILE[1])
    else:
        end, full, seen = blocks_of_queries(plan, batch, head, m0, M, N, TILE[1])
    query_rows(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_q, d_q_t, lse, mu, row_a, row_delta, scale,
        batch_shape, batch, head, head // group, (batch.to(tl.int64) * heads + head) * M, 0, 0, m0, start, end, full, 0,
        seen, M, N, K_COLUMNS, V_COLUMNS, TILE, False, MASK_LAYOUT, DROPOUT, PRECISION, REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def partial_key_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_k, d_v, d_k_t, d_v_t, lse, mu, row_a, row_delta, plan,
    scale, batch_shape, low, high, M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr,
    TILE: tl.constexpr, MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: the gradients that are given of a tile of rows of one key head."""
    n0, kv_head, batch = _tile_of_program(N, heads // group, TILE[1])
    first = 0
    last = M
    full = 0
    if plan is None:
        first, last, full, seen = band_of_keys(low, high, n0, M, N, TILE[0], TILE[1])
    else:
        seen = (plan, n0, 0, 0)  # mutate: seen
    rows = M.to(tl.int64)
    key_rows(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_k, d_v, d_k_t, d_v_t, lse, mu, row_a, row_delta,
        scale, batch_shape, batch, kv_head, group, batch * heads * rows, rows, 0, 0, n0, first, last, full, 0, seen,
        M, N, K_COLUMNS, V_COLUMNS, TILE, False, MASK_LAYOUT, DROPOUT, PRECISION, REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["low", "high", "M", "N", "heads"])
def partial_bias_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_mask, d_mask_t, lse, mu, row_a, row_delta, plan, scale,
    batch_shape, low, high, M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, OWNS: tl.constexpr, PRECISION: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the mask, of queries that see a band. Blocks come without a mask."""
    bias_tile(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_mask, d_mask_t, lse, mu, row_a, row_delta, scale,
        batch_shape, (low, high), M, N, heads, group, K_COLUMNS, V_COLUMNS, TILE, False, MASK_LAYOUT, DROPOUT, OWNS,
        PRECISION, REGULAR,
    )  # fmt: skip


class Kernels(NamedTuple):
    """The kernels of a call, for the launchers of the dense ones."""

    forward: object
    query: object
    key: object
    bias: object


DENSE = Kernels(forward_kernel, backward_query_kernel, backward_key_kernel, backward_bias_kernel)
PARTIAL = Kernels(partial_forward_kernel, partial_query_kernel, partial_key_kernel, partial_bias_kernel)
