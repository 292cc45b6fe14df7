"""Query-side backward: d_q and d_q_t of a tile of query rows, streaming over key tiles; MATH.md (13)-(15), (18)."""

import triton
import triton.language as tl

from ...layout import empty_rows
from ...operands import Inputs
from ..launch.call import Call, Maybe
from ..tiles import add_product, load_operand, scale_rows, select_head, store_rows, zero_rows
from .backward_tile import load_lse, load_statistic, probabilities, score_gradients
from .dropout import kept_tile, select_seed
from .rows import select_rows
from .visible import keys_at


@triton.jit
def _query_tile(
    acc_q, acc_q_t, query, statistics, key, mask, mask_t, drop, scale, m0, n0, at_border, only, M, N,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """Adds one key tile's part of d_q / c and d_q_t / c to the accumulators."""
    q, q_t, G, T = query
    lse, mu, row_a, row_delta = statistics
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_head, k_t_head, v_head, v_t_head = key
    k = load_operand(k_head, n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION)
    k_t = load_operand(k_t_head, n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION)
    p = probabilities(
        q, k, q_t, k_t, lse, mu, mask, mask_t, scale, m0, n0, row[:, None], column[None, :], M, N, at_border,
        only, False, MASK_LAYOUT, True, CAUSAL, PRECISION,
    )  # fmt: skip
    v = load_operand(v_head, n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION)
    v_t = load_operand(v_t_head, n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION)
    kept = kept_tile(drop, m0, n0, row[:, None], column[None, :])
    ds = score_gradients(p, v, v_t, G, T, row_a, row_delta, kept, False, PRECISION)
    acc_q = add_product(acc_q, ds[0], k, PRECISION)  # (15)
    if len(ds) > 1 and len(k_t) > 0:
        acc_q = add_product(acc_q, ds[1], k_t, PRECISION)  # mutate: acc_q
    if len(acc_q_t) > 0:
        acc_q_t = add_product(acc_q_t, ds[1], k, PRECISION)  # (18)
    return acc_q, acc_q_t


@triton.jit
def query_rows(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_q, d_q_t, lse, mu, row_a, row_delta, scale, batch_shape,
    batch, head, kv_head, base, start_q, start_k, m0, start, end, full, shift, seen, M, N,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """Writes the gradients that are given of a tile of query rows. Where and against which keys: as in forward_rows."""
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    rows = m0 + tl.arange(0, BLOCK_M)

    q_rows = load_operand(
        select_rows(q, batch, head, batch_shape, start_q, REGULAR), m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION
    )
    q_t_rows = load_operand(
        select_rows(q_t, batch, head, batch_shape, start_q, REGULAR), m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION
    )
    G = load_operand(
        select_rows(d_o, batch, head, batch_shape, start_q, REGULAR), m0, M, BLOCK_M, V_COLUMNS, REGULAR, PRECISION
    )
    T = load_operand(
        select_rows(d_o_t, batch, head, batch_shape, start_q, REGULAR), m0, M, BLOCK_M, V_COLUMNS, REGULAR, PRECISION
    )
    query = (q_rows, q_t_rows, G, T)  # mutate: query
    statistics = (
        load_lse(lse, base, rows, rows < M, MASK_LAYOUT[2]),
        load_statistic(mu, base, rows, rows < M),
        load_statistic(row_a, base, rows, rows < M),
        load_statistic(row_delta, base, rows, rows < M),
    )
    key = (
        select_rows(k, batch, kv_head, batch_shape, start_k, REGULAR),
        select_rows(k_t, batch, kv_head, batch_shape, start_k, REGULAR),
        select_rows(v, batch, kv_head, batch_shape, start_k, REGULAR),
        select_rows(v_t, batch, kv_head, batch_shape, start_k, REGULAR),
    )  # mutate: key
    head_mask = select_head(mask, batch, head, batch_shape, False)
    head_mask_t = select_head(mask_t, batch, head, batch_shape, False)
    drop = select_seed(seed, batch, head, batch_shape, DROPOUT)

    acc_q = zero_rows(BLOCK_M, K_COLUMNS, True)
    acc_q_t = zero_rows(BLOCK_M, K_COLUMNS, d_q_t is not None)
    for i in range(start, end, BLOCK_N):
        n0, at_border, only = keys_at(i, full, seen)
        acc_q, acc_q_t = _query_tile(
            acc_q, acc_q_t, query, statistics, key, head_mask, head_mask_t, drop, scale, m0 + shift, n0, at_border,
            only, M, N, K_COLUMNS, V_COLUMNS, BLOCK_M, BLOCK_N, CAUSAL, MASK_LAYOUT, PRECISION, REGULAR,
        )  # fmt: skip

    factor = tl.zeros([BLOCK_M], tl.float32) + scale  # mutate: factor
    if d_q is not None:
        d_q_head = select_rows(d_q, batch, head, batch_shape, start_q, REGULAR)
        store_rows(d_q_head, scale_rows(acc_q, factor), m0, M, K_COLUMNS, REGULAR)
    if d_q_t is not None:
        d_q_t_head = select_rows(d_q_t, batch, head, batch_shape, start_q, REGULAR)
        store_rows(d_q_t_head, scale_rows(acc_q_t, factor), m0, M, K_COLUMNS, REGULAR)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def backward_query_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_q, d_q_t, lse, mu, row_a, row_delta, scale, batch_shape,
    M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of query rows of one head against all keys. The gradients that are given are written."""
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % tiles) * BLOCK_M
    head = (pid // tiles) % heads
    batch = pid // tiles // heads
    base = (batch.to(tl.int64) * heads + head) * M
    end = N
    full = (N // BLOCK_N) * BLOCK_N
    if CAUSAL:
        end = tl.minimum(N, m0 + BLOCK_M)
        full = (tl.minimum(N, m0 + 1) // BLOCK_N) * BLOCK_N  # mutate: full
    query_rows(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_q, d_q_t, lse, mu, row_a, row_delta, scale,
        batch_shape, batch, head, head // group, base, 0, 0, m0, 0, end, full, 0, (), M, N,
        K_COLUMNS, V_COLUMNS, TILE, CAUSAL, MASK_LAYOUT, DROPOUT, PRECISION, REGULAR,
    )  # fmt: skip


def launch_backward_query(
    call: Call, inputs: Inputs, cotangents: tuple[Maybe, Maybe], statistics: tuple[Maybe, ...], scale: float,
    wanted: Inputs, kernel: object = backward_query_kernel,
) -> tuple[Maybe, Maybe]:  # fmt: skip
    """The wanted ones of d_q and d_q_t. `statistics` are lse, mu, row_a, row_delta."""
    d_q = _empty_like(inputs.q) if wanted.q else None
    d_q_t = _empty_like(inputs.q_t) if wanted.q_t else None
    if d_q is not None or d_q_t is not None:
        operands, grads = call.operands(*inputs, *cotangents), call.operands(d_q, d_q_t)
        args = (*operands, call.mask, call.mask_t, call.seed, *grads, *statistics, *call.plan)
        tile = call.tile("backward_query")
        call.launch(
            kernel, call.family("backward_query"), call.query_programs(tile.block_m), args, scale, warps=tile.warps,
            stages=tile.stages, TILE=tile.block,
        )  # fmt: skip
    return d_q, d_q_t


def _empty_like(x: Maybe) -> Maybe:
    return None if x is None else empty_rows(x, x.shape[-1])
