"""Attention, its JVP and the backward of both in O(N) memory: kernels/MATH.md's streaming form in plain torch.

The same four functions as reference.py, on any device. Three nested loops (tiled_grid.py): boxes of (batch, key head)
pairs, tiles of query rows, tiles of keys. The query heads that share a key head are further rows of one matrix, so no
key is repeated; a box holds several pairs where they are small, so a small problem takes few calls. Half types are
computed in float32. Scores and their derivatives exist one tile at a time, in a workspace that serves every tile.
"""

import torch
from torch import Tensor

from ..layout import empty_lse, empty_rows, empty_statistic, is_additive
from .patterns import Pattern
from .tiled_backward import backward as backward
from .tiled_backward import backward_jvp as backward_jvp
from .tiled_grid import Box, Grid
from .tiled_products import add_product_, finite, products_, scaled, take

Maybe = Tensor | None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Maybe, seed: Maybe, is_causal: bool, scale: float, dropout_p: float,
    pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse; MATH.md (1)-(3), (27)."""
    o, _, lse, _ = forward_jvp(q, k, v, None, None, None, mask, None, seed, is_causal, scale, dropout_p, pattern)
    return o, lse


def forward_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, mask_t: Maybe, seed: Maybe,
    is_causal: bool, scale: float, dropout_p: float, pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, o_t, lse and mu; MATH.md (1)-(7), (24), (27), (28)."""
    grid = Grid.of(q, k, mask, is_causal, mask_t, seed, dropout_p, pattern)
    o, o_t = empty_rows(q, v.shape[-1]), empty_rows(q, v.shape[-1])
    lse, mu = empty_lse(q, mask), empty_statistic(q)
    workspace = grid.workspace(3, like=q)
    for box in grid.boxes():
        key_side = (grid.load_keys(k, box), grid.load_keys(v, box), grid.load_keys(k_t, box), grid.load_keys(v_t, box))
        for rows in grid.query_tiles():
            q_, q_t_ = scale * grid.load_rows(q, box, rows), scaled(grid.load_rows(q_t, box, rows), scale)
            results = _forward_rows(grid, box, rows, q_, q_t_, key_side, workspace)
            columns = lse if is_additive(mask) else lse[..., None]
            for out, value in zip((o, o_t, columns, mu[..., None]), results, strict=True):
                grid.store_rows(out, box, rows, value)
    return o, o_t, lse, mu


def _forward_rows(
    grid: Grid, box: Box, rows: slice, q: Tensor, q_t: Maybe, key_side: tuple[Tensor, Tensor, Maybe, Maybe],
    workspace: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, o_t, lse and mu of one tile of query rows; q and q_t come with the scale of (1) and (4) in them.

    MATH.md's streaming form, with the tangent of the scores taken relative to its running mean: `mu` is (5) over the
    keys seen so far and `acc_o_t` the sum of (7) with that `mu`. Each tile moves `mu` by `step`, and `acc_o_t` with it,
    so that a large mean never enters a sum from which it would have to cancel.
    """
    _, v, k_t, v_t = key_side
    has_score_tangent = not (q_t is None and k_t is None and grid.mask_t is None)
    acc_o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    acc_o_t = torch.zeros_like(acc_o)
    m = q.new_full((*q.shape[:-1], 1), -torch.inf)
    l, mu = torch.zeros_like(m), torch.zeros_like(m)
    for keys in grid.key_tiles(rows):
        k_n, v_n, k_t_n, v_t_n = (take(x, keys) for x in key_side)
        S, S_t, product = grid.tiles(workspace, box, rows, keys)
        grid.mask_(products_(S, (q, k_n)), box, rows, keys)  # (1)
        m_old, m = m, torch.maximum(m, S.amax(-1, keepdim=True))
        p = S.sub_(finite(m)).exp_()
        alpha = torch.exp(m_old - finite(m))
        l = l * alpha + p.sum(-1, keepdim=True)  # mutate: l
        if has_score_tangent:
            products_(S_t, (q_t, k_n), (q, k_t_n))
            grid.add_mask_tangent_(S_t, box, rows, keys).sub_(mu)  # (24), less mu
            step = torch.mul(p, S_t, out=product).sum(-1, keepdim=True) / l.clamp(min=1.0)
            mu = mu + step  # (5)
            acc_o_t.addcmul_(acc_o, step, value=-1.0).mul_(alpha)  # mutate: acc_o_t.addcmul_
        elif v_t is not None:
            acc_o_t.mul_(alpha)
        if (R := grid.dropout(box, rows, keys)) is not None:
            p.mul_(R)  # mutate: p.mul_
        if has_score_tangent:
            add_product_(acc_o_t, S_t.sub_(step).mul_(p), v_n)  # (6), (7)
        add_product_(acc_o_t, p, v_t_n)  # (7)
        add_product_(acc_o.mul_(alpha), p, v_n)  # (3)
    l.clamp_(min=1.0)  # 0 in a row without a key; at least 1 in any other, where the largest score adds exp(0)
    lse = torch.cat((m, l.log()), -1) if is_additive(grid.mask) else m + l.log()  # mutate: lse
    return acc_o.div_(l), acc_o_t.div_(l), lse, mu
