"""Forward kernel: o, and under a JVP o_t, streaming over key tiles; MATH.md (1)-(7'')."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_lse, empty_rows, empty_statistic
from ...operands import Inputs
from ..launch.call import Call, Maybe
from ..tiles import (
    add_product,
    add_scaled_rows,
    biased_scores,
    exponential,
    load_operand,
    scale_rows,
    scores,
    scores_and_tangent,
    scores_sum,
    select_head,
    store_rows,
    zero_rows,
)
from .bias_tangent import load_mask_tangent
from .dropout import kept_tile, select_seed
from .rows import select_rows
from .visible import hide, keys_at


@triton.jit
def _forward_tile(
    state, q_rows, q_t_rows, k, v, k_t, v_t, mask, mask_t, drop, scale, m0, n0, at_border, only, M, N,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_LAYOUT: tl.constexpr, JVP: tl.constexpr,
    PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One key tile of the stream: the state (acc_o, acc_o_t, m, l, mean) after it; (7'')."""
    acc_o, acc_o_t, m, l, mean = state
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k_rows = load_operand(k, n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION)
    k_t_rows = load_operand(k_t, n0, N, BLOCK_N, K_COLUMNS, REGULAR, PRECISION)
    FIRST: tl.constexpr = len(q_t_rows) * len(k_rows)
    SECOND: tl.constexpr = len(q_rows) * len(k_t_rows)
    JOINT: tl.constexpr = q_rows[0].dtype == tl.float32 and PRECISION == "ieee"
    if JOINT:
        s, s_t = scores_and_tangent(q_rows, k_rows, q_t_rows, k_t_rows, FIRST, SECOND, PRECISION)
    else:
        s = scores(q_rows, k_rows, PRECISION)
    ADDITIVE: tl.constexpr = MASK_LAYOUT[2]
    s = biased_scores(s, scale, mask, m0, n0, row[:, None], column[None, :], M, N, at_border, MASK_LAYOUT, True, CAUSAL)
    s = hide(s, only, m0, n0, row[:, None], column[None, :], at_border)
    m_new = tl.maximum(m, tl.max(s, 1))
    m_safe = m_new
    if MASK_LAYOUT[3]:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # mutate: m_safe
    p = exponential(s - m_safe[:, None], ADDITIVE)
    alpha = exponential(m - m_safe, ADDITIVE)
    l = l * alpha + tl.sum(p, 1)  # mutate: l
    v_rows = load_operand(v, n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION)
    if JVP:
        acc_o_t = scale_rows(acc_o_t, alpha)  # mutate: acc_o_t (1)
    if FIRST + SECOND + len(mask_t) > 0:
        if FIRST + SECOND > 0 and not JOINT:
            s_t = scores_sum(q_t_rows, k_rows, q_rows, k_t_rows, FIRST, SECOND, PRECISION)
        if len(mask_t) > 0:  # (24), shifted
            bias_t = load_mask_tangent(mask_t, m0, n0, row[:, None], column[None, :], M, N, MASK_LAYOUT)
            if FIRST + SECOND > 0:
                bias_t += s_t * scale  # mutate: bias_t
            s_t = bias_t - mean[:, None]
        else:
            # mutate: s_t
            s_t = s_t * scale - mean[:, None]  # (4), shifted
        step = tl.sum(p * s_t, 1) / tl.where(l == 0.0, 1.0, l)  # mutate: step
        mean += step  # mutate: mean
        acc_o_t = add_scaled_rows(acc_o_t, acc_o, -step * alpha)  # mutate: acc_o_t (2)
    kept = kept_tile(drop, m0, n0, row[:, None], column[None, :])
    if len(kept) > 0:
        is_kept, _ = kept
        p = tl.where(is_kept, p, 0.0)  # mutate: p
    if FIRST + SECOND + len(mask_t) > 0:
        # mutate: acc_o_t (3)
        acc_o_t = add_product(acc_o_t, p * (s_t - step[:, None]), v_rows, PRECISION)
    if len(v_t) > 0:  # mutate: if len v_t
        v_t_rows = load_operand(v_t, n0, N, BLOCK_N, V_COLUMNS, REGULAR, PRECISION)
        acc_o_t = add_product(acc_o_t, p, v_t_rows, PRECISION)
    acc_o = add_product(scale_rows(acc_o, alpha), p, v_rows, PRECISION)  # mutate: acc_o
    return acc_o, acc_o_t, m_new, l, mean


@triton.jit
def forward_rows(
    q, k, v, q_t, k_t, v_t, mask, mask_t, seed, o, o_t, lse, mu, scale, batch_shape, batch, head, kv_head, base,
    start_q, start_k, m0, start, end, full, shift, seen, M, N,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """Writes the results of a tile of query rows, from m0 of M on, against its keys of N.

    A head's queries start at row `start_q` of its operands, its keys at `start_k`, its statistics at `base`. The keys
    are those from `start` to `end` (or what visible.py counts so); from `full` on they cross a border. Under CAUSAL
    query m sees keys up to m + shift.
    """
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    JVP: tl.constexpr = o_t is not None
    rows = m0 + tl.arange(0, BLOCK_M)

    q_rows = load_operand(
        select_rows(q, batch, head, batch_shape, start_q, REGULAR), m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION
    )
    q_t_rows = load_operand(
        select_rows(q_t, batch, head, batch_shape, start_q, REGULAR), m0, M, BLOCK_M, K_COLUMNS, REGULAR, PRECISION
    )
    k_head = select_rows(k, batch, kv_head, batch_shape, start_k, REGULAR)
    v_head = select_rows(v, batch, kv_head, batch_shape, start_k, REGULAR)
    k_t_head = select_rows(k_t, batch, kv_head, batch_shape, start_k, REGULAR)
    v_t_head = select_rows(v_t, batch, kv_head, batch_shape, start_k, REGULAR)
    head_mask = select_head(mask, batch, head, batch_shape, False)
    head_mask_t = select_head(mask_t, batch, head, batch_shape, False)
    drop = select_seed(seed, batch, head, batch_shape, DROPOUT)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    acc_o = zero_rows(BLOCK_M, V_COLUMNS, True)
    acc_o_t = zero_rows(BLOCK_M, V_COLUMNS, JVP)
    state = (acc_o, acc_o_t, m, l, mean)
    for i in range(start, end, BLOCK_N):
        n0, at_border, only = keys_at(i, full, seen)
        state = _forward_tile(
            state, q_rows, q_t_rows, k_head, v_head, k_t_head, v_t_head, head_mask, head_mask_t, drop, scale,
            m0 + shift, n0, at_border, only, M, N, K_COLUMNS, V_COLUMNS, BLOCK_M, BLOCK_N, CAUSAL, MASK_LAYOUT,
            JVP, PRECISION, REGULAR,
        )  # fmt: skip

    acc_o, acc_o_t, m, l, mean = state
    norm = 1.0 / tl.where(l == 0.0, 1.0, l)
    statistic = base + rows
    ADDITIVE: tl.constexpr = MASK_LAYOUT[2]
    if ADDITIVE:
        tl.store(lse + statistic * 2, m, mask=rows < M)  # mutate: tl.store (1)
        # mutate: tl.store (2)
        tl.store(lse + statistic * 2 + 1, -tl.log2(norm) * 0.6931471805599453, mask=rows < M)
    else:
        # mutate: tl.store (3)
        tl.store(lse + statistic, (m - tl.log2(norm)) * 0.6931471805599453, mask=rows < M)
    if len(drop) > 0:
        _, _, _, _, factor = drop
        norm *= factor  # mutate: norm
    o_head = select_rows(o, batch, head, batch_shape, start_q, REGULAR)
    store_rows(o_head, scale_rows(acc_o, norm), m0, M, V_COLUMNS, REGULAR)
    if JVP:
        tl.store(mu + statistic, mean, mask=rows < M)
        o_t_head = select_rows(o_t, batch, head, batch_shape, start_q, REGULAR)
        store_rows(o_t_head, scale_rows(acc_o_t, norm), m0, M, V_COLUMNS, REGULAR)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def forward_kernel(
    q, k, v, q_t, k_t, v_t, mask, mask_t, seed, o, o_t, lse, mu, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_LAYOUT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of query rows of one head against all keys."""
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % tiles) * BLOCK_M
    head = (pid // tiles) % heads
    batch = pid // tiles // heads
    kv_head = head // group  # mutate: kv_head
    base = (batch.to(tl.int64) * heads + head) * M
    end = N  # mutate: end
    full = (N // BLOCK_N) * BLOCK_N
    if CAUSAL:
        end = tl.minimum(N, m0 + BLOCK_M)
        full = (tl.minimum(N, m0 + 1) // BLOCK_N) * BLOCK_N
    forward_rows(
        q, k, v, q_t, k_t, v_t, mask, mask_t, seed, o, o_t, lse, mu, scale, batch_shape, batch, head, kv_head, base,
        0, 0, m0, 0, end, full, 0, (), M, N, K_COLUMNS, V_COLUMNS, TILE, CAUSAL, MASK_LAYOUT, DROPOUT, PRECISION,
        REGULAR,
    )  # fmt: skip


def launch_forward(
    call: Call, inputs: Inputs, mask: Maybe, scale: float, jvp: bool, kernel: object = forward_kernel
) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """o, o_t, lse and mu (o_t and mu None without a JVP)."""
    q = inputs.q
    o, lse = empty_rows(q, inputs.v.shape[-1]), empty_lse(q, mask)
    o_t, mu = (torch.empty_like(o), empty_statistic(q)) if jvp else (None, None)
    if call.is_empty:
        lse.fill_(-torch.inf)
        return o.zero_(), None if o_t is None else o_t.zero_(), lse, None if mu is None else mu.zero_()
    # mutate: args
    args = (*call.operands(*inputs), call.mask, call.mask_t, call.seed, *call.operands(o, o_t), lse, mu, *call.plan)
    tile = call.tile("forward")
    call.launch(
        kernel, call.family("forward"), call.query_programs(tile.block_m), args, scale, warps=tile.warps,
        stages=tile.stages, TILE=tile.block,
    )  # fmt: skip
    return o, o_t, lse, mu
