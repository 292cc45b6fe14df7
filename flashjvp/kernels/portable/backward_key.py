"""Key-side backward: d_k, d_v, d_k_t, d_v_t of a tile of key rows, streaming over queries; MATH.md (16)-(20).

The query heads that share a key head are added in the same program, in order, so the result is deterministic and needs
no atomics.
"""

import triton
import triton.language as tl

from ...layout import empty_rows
from ...operands import Inputs
from ..launch import schedule
from ..launch.call import Call, Maybe
from ..tiles import add_product, load_operand, scale_rows, select_head, store_rows, zero_rows
from .backward_tile import probabilities, score_gradients
from .dropout import both_dropped, kept_tile, select_seed
from .rows import select_rows
from .visible import queries_at, queries_of


@triton.jit
def _key_tile(
    state, key, query, statistics, base, mask, mask_t, drop, scale, m0, at_border, only, n0, M, N,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """Adds one query tile's part of d_k / c, d_v, d_k_t / c, d_v_t to the accumulators that are not empty."""
    acc_k, acc_v, acc_k_t, acc_v_t = state
    k, k_t, v, v_t = key
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # Rows beyond M load as zeros, and so do their statistics: P is then finite and all that it multiplies is zero.
    first, inside = base + m0, row < M - m0
    lse, mu, row_a, row_delta = statistics
    q_head, q_t_head, d_o_head, d_o_t_head = query
    q = load_operand(q_head, m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION)
    q_t = load_operand(q_t_head, m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION)
    p = probabilities(
        q, k, q_t, k_t, (lse, first, row, inside), (mu, first, row, inside), mask, mask_t, scale, m0, n0,
        row[None, :], column[:, None], M, N, at_border, only, True, MASK_LAYOUT, False, CAUSAL,
        PRECISION,
    )  # fmt: skip
    G = load_operand(d_o_head, m0, M, BLOCK_M, V_COLUMNS, REGULAR, PRECISION)
    T = load_operand(d_o_t_head, m0, M, BLOCK_M, V_COLUMNS, REGULAR, PRECISION)
    kept = kept_tile(drop, m0, n0, row[None, :], column[:, None])
    rp = both_dropped(p, kept)  # mutate: rp
    if len(acc_v) > 0 and len(G) > 0:  # (17), (31)
        acc_v = add_product(acc_v, rp[0], G, PRECISION)
    if len(acc_v) > 0 and len(T) > 0 and len(p) > 1:
        acc_v = add_product(acc_v, rp[1], T, PRECISION)  # mutate: acc_v
    if len(acc_v_t) > 0:
        acc_v_t = add_product(acc_v_t, rp[0], T, PRECISION)  # (20), (32)
    if len(acc_k) + len(acc_k_t) > 0:
        ds = score_gradients(
            p,
            v,
            v_t,
            G,
            T,
            (row_a, first, row, inside),
            (row_delta, first, row, inside),
            kept,
            True,
            PRECISION,
        )  # mutate: ds
        if len(acc_k) > 0:  # (16)
            acc_k = add_product(acc_k, ds[0], q, PRECISION)
        if len(acc_k) > 0 and len(ds) > 1 and len(q_t) > 0:
            acc_k = add_product(acc_k, ds[1], q_t, PRECISION)  # mutate: acc_k
        if len(acc_k_t) > 0:
            acc_k_t = add_product(acc_k_t, ds[1], q, PRECISION)  # (19)
    return acc_k, acc_v, acc_k_t, acc_v_t


@triton.jit
def key_rows(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_k, d_v, d_k_t, d_v_t, lse, mu, row_a, row_delta, scale,
    batch_shape, batch, kv_head, group, statistics_start, statistics_step, start_q, start_k, n0, first, last, full,
    shift, seen, M, N, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """Writes the gradients that are given of a tile of key rows, from n0 of N on, from its queries of M.

    These are those from `first` to `last` (or what visible.py counts so); before `full` they cross a border. The
    statistics of the batch entry start at `statistics_start`, those of its heads are `statistics_step` apart; the rest
    is as in forward_rows.
    """
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    k_rows = load_operand(
        select_rows(k, batch, kv_head, batch_shape, start_k, REGULAR), n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION
    )
    k_t_rows = load_operand(
        select_rows(k_t, batch, kv_head, batch_shape, start_k, REGULAR), n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION
    )
    v_rows = load_operand(
        select_rows(v, batch, kv_head, batch_shape, start_k, REGULAR), n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION
    )
    v_t_rows = load_operand(
        select_rows(v_t, batch, kv_head, batch_shape, start_k, REGULAR), n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION
    )
    key = (k_rows, k_t_rows, v_rows, v_t_rows)
    state = (
        zero_rows(BLOCK_N, K_COLUMNS, d_k is not None),
        zero_rows(BLOCK_N, V_COLUMNS, d_v is not None),
        zero_rows(BLOCK_N, K_COLUMNS, d_k_t is not None),
        zero_rows(BLOCK_N, V_COLUMNS, d_v_t is not None),
    )
    statistics = (lse, mu, row_a, row_delta)
    for member in range(group):  # mutate: for member range
        head = kv_head * group + member
        base = statistics_start + head * statistics_step  # mutate: base
        query = (
            select_rows(q, batch, head, batch_shape, start_q, REGULAR),
            select_rows(q_t, batch, head, batch_shape, start_q, REGULAR),
            select_rows(d_o, batch, head, batch_shape, start_q, REGULAR),
            select_rows(d_o_t, batch, head, batch_shape, start_q, REGULAR),
        )
        head_mask = select_head(mask, batch, head, batch_shape, False)  # mutate: head_mask
        head_mask_t = select_head(mask_t, batch, head, batch_shape, False)
        drop = select_seed(seed, batch, head, batch_shape, DROPOUT)
        begin, end, seen_of_head = queries_of(first, last, seen, batch, head, M, N)
        for i in range(begin, end, BLOCK_M):
            m0, at_border, only = queries_at(i, full, seen_of_head)
            state = _key_tile(
                state, key, query, statistics, base, head_mask, head_mask_t, drop, scale, m0, at_border, only,
                n0 - shift, M, N, K_COLUMNS, V_COLUMNS, BLOCK_M, BLOCK_N, CAUSAL, MASK_LAYOUT, PRECISION, REGULAR,
            )  # fmt: skip

    acc_k, acc_v, acc_k_t, acc_v_t = state
    factor = tl.zeros([BLOCK_N], tl.float32) + scale
    if d_k is not None:
        d_k_head = select_rows(d_k, batch, kv_head, batch_shape, start_k, REGULAR)
        store_rows(d_k_head, scale_rows(acc_k, factor), n0, N, K_COLUMNS, REGULAR)
    if d_v is not None:
        store_rows(select_rows(d_v, batch, kv_head, batch_shape, start_k, REGULAR), acc_v, n0, N, V_COLUMNS, REGULAR)
    if d_k_t is not None:
        d_k_t_head = select_rows(d_k_t, batch, kv_head, batch_shape, start_k, REGULAR)
        # mutate: store_rows
        store_rows(d_k_t_head, scale_rows(acc_k_t, factor), n0, N, K_COLUMNS, REGULAR)
    if d_v_t is not None:
        d_v_t_head = select_rows(d_v_t, batch, kv_head, batch_shape, start_k, REGULAR)
        store_rows(d_v_t_head, acc_v_t, n0, N, V_COLUMNS, REGULAR)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def backward_key_kernel(
    q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_k, d_v, d_k_t, d_v_t, lse, mu, row_a, row_delta, scale,
    batch_shape, M, N, heads, group, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows of one key head against all its queries. The gradients that are given are written."""
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    tiles = tl.cdiv(N, BLOCK_N)
    kv_heads = heads // group
    pid = tl.program_id(0)
    n0 = (pid % tiles) * BLOCK_N
    kv_head = (pid // tiles) % kv_heads
    batch = pid // tiles // kv_heads
    # Query tiles from `first` to `full` cross the causal diagonal. A ragged last tile needs no mask: its missing rows
    # load as zeros.
    first = 0
    full = 0
    if CAUSAL:
        first = (n0 // BLOCK_M) * BLOCK_M  # mutate: first
        full = tl.minimum(tl.cdiv(n0 + BLOCK_N - 1, BLOCK_M) * BLOCK_M, M)
    rows = M.to(tl.int64)
    key_rows(
        q, k, v, q_t, k_t, v_t, d_o, d_o_t, mask, mask_t, seed, d_k, d_v, d_k_t, d_v_t, lse, mu, row_a, row_delta,
        scale, batch_shape, batch, kv_head, group, batch * heads * rows, rows, 0, 0, n0, first, M, full, 0, (),
        M, N, K_COLUMNS, V_COLUMNS, TILE, CAUSAL, MASK_LAYOUT, DROPOUT, PRECISION, REGULAR,
    )  # fmt: skip


def launch_backward_key(
    call: Call, inputs: Inputs, cotangents: tuple[Maybe, Maybe], statistics: tuple[Maybe, ...], scale: float,
    wanted: Inputs, kernel: object = backward_key_kernel,
) -> tuple[Maybe, ...]:  # fmt: skip
    """The wanted ones of d_k, d_v, d_k_t, d_v_t.

    `statistics` are lse, mu, row_a, row_delta. One launch for all where four accumulators fit the registers, else one
    for the keys' and one for the values' gradients.
    """
    sources = (inputs.k, wanted.k), (inputs.v, wanted.v), (inputs.k_t, wanted.k_t), (inputs.v_t, wanted.v_t)
    grads = tuple([empty_rows(x, x.shape[-1]) if want and x is not None else None for x, want in sources])
    operands = call.operands(*inputs, *cotangents)
    d_k, d_v, d_k_t, d_v_t = call.operands(*grads)
    for family, outputs in schedule.key_side_launches((d_k, d_v, d_k_t, d_v_t), call.width, call.precision):
        args = (*operands, call.mask, call.mask_t, call.seed, *outputs, *statistics, *call.plan)
        tile = call.tile(family)
        call.launch(
            kernel, call.family(family), call.key_programs(tile.block_n), args, scale, warps=tile.warps,
            stages=tile.stages, TILE=tile.block,
        )  # fmt: skip
    return grads
