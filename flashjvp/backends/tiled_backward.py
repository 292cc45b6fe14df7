"""The backward functions of the tiled backend (tiled.py): gradients of attention and of its JVP, tile by tile."""

from torch import Tensor

from ..layout import empty_bias, empty_rows, empty_statistic, is_additive
from .patterns import Pattern
from .tiled_grid import Box, Grid
from .tiled_products import add_product_, dropped_, finite, products_, row_product, scaled, take

Maybe = Tensor | None


def backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Maybe, seed: Maybe, is_causal: bool,
    scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool], pattern: Pattern | None = None,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_mask; MATH.md (9)-(17), (25) with no tangent."""
    mu = empty_statistic(q)  # which nothing reads without tangents
    of_q, of_k, of_v, of_mask = wanted
    d_q, d_k, d_v, _, _, _, d_mask, _ = backward_jvp(
        d_o, None, q, k, v, None, None, None, o, None, lse, mu, mask, None, seed, is_causal, scale, dropout_p,
        (of_q, of_k, of_v, False, False, False, of_mask, False), pattern,
    )  # fmt: skip
    return d_q, d_k, d_v, d_mask


def backward_jvp(
    d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe,
    o: Tensor, o_t: Maybe, lse: Tensor, mu: Tensor, mask: Maybe, mask_t: Maybe, seed: Maybe, is_causal: bool,
    scale: float, dropout_p: float, wanted: tuple[bool, ...], pattern: Pattern | None = None,
) -> tuple[Maybe, ...]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, d_mask, d_mask_t; MATH.md (9)-(20), (25), (29)-(32).

    A missing cotangent is zero.
    """
    grid = Grid.of(q, k, mask, is_causal, mask_t, seed, dropout_p, pattern)
    *wanted_of_inputs, of_mask, of_mask_t = wanted
    grads = tuple(
        empty_rows(like, like.shape[-1]) if want and like is not None else None
        for like, want in zip((q, k, v, q_t, k_t, v_t), wanted_of_inputs, strict=True)
    )
    mask_sums = grid.zero_mask(of_mask), grid.zero_mask(of_mask_t and mask_t is not None)
    d_q, d_k, d_v, d_q_t, d_k_t, d_v_t = grads
    workspace = grid.workspace(4, like=q)
    for box in grid.boxes():
        key_side = (grid.load_keys(k, box), grid.load_keys(v, box), grid.load_keys(k_t, box), grid.load_keys(v_t, box))
        key_side_sums = tuple(grid.zero_keys(x, box) for x in (d_k, d_v, d_k_t, d_v_t))
        for rows in grid.query_tiles():
            q_, q_t_ = scale * grid.load_rows(q, box, rows), scaled(grid.load_rows(q_t, box, rows), scale)
            query_side_sums = (grid.zero_rows(d_q, box, rows), grid.zero_rows(d_q_t, box, rows))
            G, T = grid.load_rows(d_o, box, rows), grid.load_rows(d_o_t, box, rows)
            O, O_t = grid.load_rows(o, box, rows), grid.load_rows(o_t, box, rows)
            columns = lse if is_additive(mask) else lse[..., None]
            lse_, mu_ = grid.load_rows(columns, box, rows), grid.load_rows(mu[..., None], box, rows)
            row_a = row_product(T, O, like=mu_)  # (11)
            row_delta = row_product(G, O, like=mu_) + row_product(T, O_t, like=mu_)  # (12)
            statistics = (finite(lse_), mu_, row_a, row_delta)
            query_side = (q_, q_t_, G, T)
            sums = (*query_side_sums, *key_side_sums, *mask_sums)
            _backward_rows(grid, box, rows, query_side, statistics, key_side, sums, workspace)
            for out, query_side_sum in zip((d_q, d_q_t), query_side_sums, strict=True):
                grid.store_rows(out, box, rows, scaled(query_side_sum, scale))
        for out, key_side_sum in zip((d_k, d_v, d_k_t, d_v_t), key_side_sums, strict=True):
            grid.store_keys(out, box, key_side_sum)
    return *grads, *(_as_mask(x, mask) for x in mask_sums)


def _as_mask(mask_sum: Maybe, mask: Maybe) -> Maybe:
    return None if mask_sum is None or mask is None else empty_bias(mask).copy_(mask_sum.reshape(mask.shape))


def _backward_rows(
    grid: Grid, box: Box, rows: slice, query_side: tuple[Tensor, Maybe, Maybe, Maybe],
    statistics: tuple[Tensor, ...], key_side: tuple[Tensor, Tensor, Maybe, Maybe], sums: tuple[Maybe, ...],
    workspace: Tensor,
) -> None:  # fmt: skip
    """Adds the part of one tile of query rows to the gradients: a sum that is None is not wanted.

    q and q_t come with the scale of (1), (4), (16) and (19) in them; the caller applies that of (15) and (18).
    """
    q, q_t, G, T = query_side
    lse, mu, row_a, row_delta = statistics
    d_q, d_q_t, *key_side_sums, d_mask, d_mask_t = sums
    _, _, k_t, v_t = key_side
    d_k, d_v, d_k_t, _ = key_side_sums
    has_score_tangent = T is not None and not (q_t is None and k_t is None and grid.mask_t is None)
    wants_dS = any(x is not None for x in (d_q, d_k, d_mask))
    wants_dS = wants_dS and (G is not None or has_score_tangent or v_t is not None)
    wants_A = has_score_tangent and (wants_dS or any(x is not None for x in (d_q_t, d_k_t, d_mask_t)))
    wants_S_t = has_score_tangent and (wants_dS or d_v is not None)
    for keys in grid.key_tiles(rows):
        k_n, v_n, k_t_n, v_t_n = (take(x, keys) for x in key_side)
        d_k_n, d_v_n, d_k_t_n, d_v_t_n = (take(x, keys) for x in key_side_sums)
        P, S_t, A, B = grid.tiles(workspace, box, rows, keys)
        grid.mask_(products_(P, (q, k_n)), box, rows, keys)  # (1)
        for part in lse.split(1, -1):
            P.sub_(part)
        P.exp_()  # (2)
        R = grid.dropout(box, rows, keys)
        RP = P if R is None else R * P
        add_product_(d_v_n, RP.mT, G)  # (17), (31)
        add_product_(d_v_t_n, RP.mT, T)  # (20), (32)
        if wants_S_t:
            products_(S_t, (q_t, k_n), (q, k_t_n))
            grid.add_mask_tangent_(S_t, box, rows, keys).sub_(mu)  # (24), less mu
        if wants_A:
            dropped_(products_(A, (T, v_n)), R).sub_(row_a)  # (29), less a
        if wants_dS:
            # mutate: dS
            dS = dropped_(products_(B, (G, v_n), (T, v_t_n)), R).sub_(row_delta)  # (30), less delta
            if has_score_tangent:
                dS.addcmul_(S_t, A)
            dS.mul_(P)  # (14)
            grid.add_to_mask(d_mask, dS, box, rows, keys)  # (25)
            add_product_(d_q, dS, k_n)  # (15)
            add_product_(d_k_n, dS.mT, q)  # (16)
        if wants_A:
            dS_t = A.mul_(P)  # (13)
            grid.add_to_mask(d_mask_t, dS_t, box, rows, keys)  # (25)
            add_product_(d_q, dS_t, k_t_n)  # (15)
            add_product_(d_k_n, dS_t.mT, q_t)  # (16)
            add_product_(d_q_t, dS_t, k_n)  # (18)
            # mutate: add_product_
            add_product_(d_k_t_n, dS_t.mT, q)  # (19)
        if has_score_tangent and d_v_n is not None:
            RP_t = S_t.mul_(RP)  # (6)
            add_product_(d_v_n, RP_t.mT, T)  # (17), (31)
