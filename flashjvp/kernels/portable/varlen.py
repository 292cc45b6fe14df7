"""Kernels for packed sequences: the rows of several sequences lie one after the other, and each attends to itself.

A program finds its sequence on the device from the cumulated lengths, so the host never reads them. Then it does what a
program of the dense kernels does on that sequence alone (forward_rows, query_rows, key_rows), to the bit. `cu` holds
the cumulated lengths of queries, and after them those of keys: 2 (B + 1) numbers for B sequences.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...operands import Inputs
from ..launch import schedule
from ..launch.call import Call, Maybe
from ..tiles import from_odd
from .backward_key import key_rows
from .backward_query import query_rows
from .forward import forward_rows

NO_MASK = (0, False, False, True)  # MASK_LAYOUT: a causal row may be without a key where a sequence has more queries


@triton.jit
def sequence_of(cu, tile, count, ROWS: tl.constexpr):
    """Which of `count` sequences a tile of ROWS rows belongs to, and the first row of the tile in it.

    Of the rows of all sequences there are rows // ROWS + count tiles: sequence b has those from cu[b] // ROWS + b on,
    at least as many as it needs. What it does not need starts beyond its end.
    """
    before = 0
    for first in range(0, count, 128):
        b = first + tl.arange(0, 128)
        starts = tl.load(cu + b, mask=b < count, other=0).to(tl.int32) // ROWS + b
        before += tl.sum(((starts <= tile) & (b < count)).to(tl.int32))  # mutate: before
    sequence = tl.maximum(before - 1, 0)
    return sequence, (tile - (tl.load(cu + sequence).to(tl.int32) // ROWS + sequence)) * ROWS


@triton.jit
def place(batch_shape, heads):
    """Of this program: the number of its tile, of how many, and its head and batch entry."""
    entries = heads
    for i in tl.static_range(len(batch_shape)):
        entries *= from_odd(batch_shape[i])
    tiles = tl.num_programs(0) // entries
    pid = tl.program_id(0)
    return pid % tiles, tiles, (pid // tiles) % heads, pid // tiles // heads


@triton.jit
def rows_of(cu, sequence, total):
    """The first row of a sequence and its number of rows, which stay inside `total` whatever the numbers in `cu`."""
    start = tl.minimum(tl.maximum(tl.load(cu + sequence).to(tl.int32), 0), total)
    end = tl.minimum(tl.load(cu + sequence + 1).to(tl.int32), total)  # mutate: end
    return start, tl.maximum(end - start, 0)


@triton.jit
def _keys_seen(m0, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """For queries from m0 on: the end of the keys they see, the first that not all of them see, and how far the causal
    diagonal is shifted, so that the last query sees the last key."""
    end = keys
    full = (keys // BLOCK_N) * BLOCK_N
    shift = 0
    if CAUSAL:
        shift = keys - queries  # mutate: shift
        end = tl.minimum(keys, tl.maximum(m0 + BLOCK_M + shift, 0))
        full = (tl.minimum(keys, tl.maximum(m0 + 1 + shift, 0)) // BLOCK_N) * BLOCK_N
    return end, full, shift


@triton.jit(do_not_specialize=["M", "N", "heads"])
def varlen_forward_kernel(
    q, k, v, q_t, k_t, v_t, cu, o, o_t, lse, mu, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of query rows of one sequence and head against all keys of the sequence."""
    tile, tiles, head, batch = place(batch_shape, heads)
    count = tiles - M // TILE[0]
    sequence, m0 = sequence_of(cu, tile, count, TILE[0])
    start_q, queries = rows_of(cu, sequence, M)
    if m0 >= queries:
        return
    start_k, keys = rows_of(cu + count + 1, sequence, N)
    end, full, shift = _keys_seen(m0, queries, keys, TILE[0], TILE[1], CAUSAL)
    forward_rows(
        q, k, v, q_t, k_t, v_t, None, None, None, o, o_t, lse, mu, scale, batch_shape, batch, head, head // group,
        (batch.to(tl.int64) * heads + head) * M + start_q, start_q, start_k, m0, 0, end, full, shift, (),
        queries, keys, K_COLUMNS, V_COLUMNS, TILE, CAUSAL, MASK_LAYOUT, (), PRECISION, REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "heads"])
def varlen_query_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, cu, d_q, d_q_t, lse, mu, row_a, row_delta, scale, batch_shape,
    M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: d_q and d_q_t of a tile of query rows of one sequence and head."""
    tile, tiles, head, batch = place(batch_shape, heads)
    count = tiles - M // TILE[0]
    sequence, m0 = sequence_of(cu, tile, count, TILE[0])
    start_q, queries = rows_of(cu, sequence, M)
    if m0 >= queries:
        return
    start_k, keys = rows_of(cu + count + 1, sequence, N)
    end, full, shift = _keys_seen(m0, queries, keys, TILE[0], TILE[1], CAUSAL)
    query_rows(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, None, None, None, d_q, d_q_t, lse, mu, row_a, row_delta, scale,
        batch_shape, batch, head, head // group, (batch.to(tl.int64) * heads + head) * M + start_q, start_q, start_k,
        m0, 0, end, full, shift, (), queries, keys, K_COLUMNS, V_COLUMNS, TILE, CAUSAL, MASK_LAYOUT, (), PRECISION,
        REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "heads"])
def varlen_key_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, cu, d_k, d_v, d_k_t, d_v_t, lse, mu, row_a, row_delta, scale,
    batch_shape, M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_LAYOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: the gradients that are given of a tile of key rows of one sequence and key head."""
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    tile, tiles, kv_head, batch = place(batch_shape, heads // group)
    count = tiles - N // BLOCK_N
    sequence, n0 = sequence_of(cu + count + 1, tile, count, BLOCK_N)
    start_k, keys = rows_of(cu + count + 1, sequence, N)
    if n0 >= keys:
        return
    start_q, queries = rows_of(cu, sequence, M)  # mutate: start_q, queries
    first = 0
    full = 0
    shift = 0
    if CAUSAL:
        shift = keys - queries
        first = (tl.maximum(n0 - shift, 0) // BLOCK_M) * BLOCK_M
        full = tl.minimum(tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M, queries)
    key_rows(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, None, None, None, d_k, d_v, d_k_t, d_v_t, lse, mu, row_a, row_delta, scale,
        batch_shape, batch, kv_head, group, batch.to(tl.int64) * heads * M + start_q, M.to(tl.int64), start_q, start_k,
        n0, first, queries, full, shift, (), queries, keys, K_COLUMNS, V_COLUMNS, TILE, CAUSAL, MASK_LAYOUT, (),
        PRECISION, REGULAR,
    )  # fmt: skip


class Sequences:
    """The packed operands [*batch, H, rows, D] of a call: launches of the kernels above."""

    def __init__(self, call: Call, cu: Tensor) -> None:
        """cu: int32 [2, B + 1], contiguous."""
        self._call, self._cu, self._count = call, cu, cu.shape[-1] - 1

    def forward(self, inputs: Inputs, results: tuple[Tensor, Maybe, Tensor, Maybe], scale: float) -> None:
        """Writes o, o_t, lse, mu of every sequence's queries."""
        call, tile = self._call, self._call.tile("forward")
        o, o_t, lse, mu = results
        args = (*call.operands(*inputs), self._cu, *call.operands(o, o_t), lse, mu)
        self._launch(varlen_forward_kernel, "varlen_forward", self._query_programs(tile), args, scale, tile)

    def query_gradients(
        self, inputs: Inputs, cotangents: tuple[Maybe, Maybe], grads: tuple[Maybe, Maybe],
        statistics: tuple[Maybe, ...], scale: float,
    ) -> None:  # fmt: skip
        """Writes d_q and d_q_t, where they are given."""
        call, tile = self._call, self._call.tile("backward_query")
        args = (*call.operands(*inputs, *cotangents), self._cu, *call.operands(*grads), *statistics)
        self._launch(varlen_query_kernel, "varlen_query", self._query_programs(tile), args, scale, tile)

    def key_gradients(
        self, inputs: Inputs, cotangents: tuple[Maybe, Maybe], grads: tuple[Maybe, Maybe, Maybe, Maybe],
        statistics: tuple[Maybe, ...], scale: float,
    ) -> None:  # fmt: skip
        """Writes d_k, d_v, d_k_t, d_v_t, where they are given."""
        call = self._call
        d_k, d_v, d_k_t, d_v_t = call.operands(*grads)
        for family, outputs in schedule.key_side_launches((d_k, d_v, d_k_t, d_v_t), call.width, call.precision):
            tile = call.tile(family)
            args = (*call.operands(*inputs, *cotangents), self._cu, *outputs, *statistics)
            tiles = call.sizes.keys // tile.block_n + self._count
            programs = call.programs * call.kv_heads * tiles
            self._launch(varlen_key_kernel, f"varlen_{family}", programs, args, scale, tile)

    def _query_programs(self, tile: schedule.Tile) -> int:
        tiles = self._call.sizes.queries // tile.block_m + self._count
        return self._call.programs * self._call.sizes.heads * tiles

    def _launch(
        self, kernel: object, family: str, programs: int, args: tuple[object, ...], scale: float, tile: schedule.Tile
    ) -> None:
        self._call.launch(
            kernel, family, programs, args, scale, warps=tile.warps, stages=tile.stages, TILE=tile.block,
            MASK_LAYOUT=NO_MASK,
        )  # fmt: skip
