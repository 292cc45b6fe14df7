"""The backward preprocess: a = rowsum(T * O) and delta = rowsum(G * O + T * O_t); MATH.md (11), (12)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import empty_statistic
from ..launch.call import Call, Maybe
from ..tiles import load_rows, select_head


@triton.jit
def row_dot(x, y):
    """rowsum(x * y) of two tiles, in float32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):  # mutate: for i tl
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["M", "N", "heads"])
def preprocess_kernel(
    d_o, d_o_t, o, o_t, row_a, row_delta, scale, batch_shape, M, N, heads, group,
    V_COLUMNS: tl.constexpr, TILE: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: a tile of query rows of one head. A missing cotangent is zero."""
    BLOCK_M: tl.constexpr = TILE[0]
    tiles = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    batch = pid // tiles // heads
    m0 = (pid % tiles) * BLOCK_M
    rows = m0 + tl.arange(0, BLOCK_M)
    statistic = (batch.to(tl.int64) * heads + head) * M + rows

    o_rows = load_rows(select_head(o, batch, head, batch_shape, REGULAR), m0, M, BLOCK_M, V_COLUMNS, REGULAR)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if d_o is not None:
        G = load_rows(select_head(d_o, batch, head, batch_shape, REGULAR), m0, M, BLOCK_M, V_COLUMNS, REGULAR)
        delta += row_dot(G, o_rows)  # mutate: delta (1)
    if d_o_t is not None:
        T = load_rows(select_head(d_o_t, batch, head, batch_shape, REGULAR), m0, M, BLOCK_M, V_COLUMNS, REGULAR)
        o_t_rows = load_rows(select_head(o_t, batch, head, batch_shape, REGULAR), m0, M, BLOCK_M, V_COLUMNS, REGULAR)
        delta += row_dot(T, o_t_rows)  # mutate: delta (2)
        tl.store(row_a + statistic, row_dot(T, o_rows), mask=rows < M)
    tl.store(row_delta + statistic, delta, mask=rows < M)


def launch_preprocess(call: Call, q: Tensor, d_o: Maybe, d_o_t: Maybe, o: Tensor, o_t: Maybe) -> tuple[Maybe, Tensor]:
    """row_a (None without d_o_t) and row_delta, float32 [*batch, Hq, M]."""
    row_delta = empty_statistic(q)
    row_a = None if d_o_t is None else torch.empty_like(row_delta)
    operands = call.operands(d_o, d_o_t, o, None if d_o_t is None else o_t)
    args, tile = (*operands, row_a, row_delta), call.tile("backward_preprocess")
    call.launch(
        preprocess_kernel, "backward_preprocess", call.query_programs(tile.block_m), args, 0.0, warps=tile.warps,
        stages=tile.stages, TILE=tile.block,
    )  # fmt: skip
    return row_a, row_delta
