"""Attention, its JVP and the backward of both in O(N) memory: kernels/MATH.md's streaming form in plain torch.

The same four functions as reference.py, on any device. Three nested loops (`_Grid`): boxes of (batch, key head) pairs,
tiles of query rows, tiles of keys. The query heads that share a key head are further rows of one matrix, so no key is
repeated; a box holds several pairs where they are small, so a small problem takes few calls. Half types are computed in
float32. Scores and their derivatives exist one tile at a time, in a workspace that serves every tile.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ..layout import STATISTIC_DTYPE, empty_lse, empty_rows, empty_statistic, is_additive

Maybe = Tensor | None
Box = tuple[slice, ...]
"""One slice for each batch dim and one for the key heads."""

CPU_TILE = (512, 2048)
"""Query rows and keys of a tile on a CPU: 4 MiB of float32, so that a workspace of four stays in the last-level cache.

A quarter of that takes about 5% less time on one thread, but four times the parallel regions on several; each region
waits for its slowest thread, and on a busy machine those waits are what takes the time.
"""
DEVICE_TILE = (1024, 4096)
"""The same on an accelerator, where the products of a smaller tile would take less time than their launches."""


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Maybe, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """o and lse; MATH.md (1)-(3)."""
    o, _, lse, _ = forward_jvp(q, k, v, None, None, None, mask, is_causal, scale)
    return o, lse


def forward_jvp(
    q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, o_t, lse and mu; MATH.md (1)-(7)."""
    grid = _Grid.of(q, k, mask, is_causal)
    o, o_t = empty_rows(q, v.shape[-1]), empty_rows(q, v.shape[-1])
    lse, mu = empty_lse(q, mask), empty_statistic(q)
    workspace = grid.workspace(3, like=q)
    for box in grid.boxes():
        key_side = (grid.load_keys(k, box), grid.load_keys(v, box), grid.load_keys(k_t, box), grid.load_keys(v_t, box))
        for rows in grid.query_tiles():
            q_, q_t_ = scale * grid.load_rows(q, box, rows), _scaled(grid.load_rows(q_t, box, rows), scale)
            results = _forward_rows(grid, box, rows, q_, q_t_, key_side, workspace)
            columns = lse if is_additive(mask) else lse[..., None]
            for out, value in zip((o, o_t, columns, mu[..., None]), results, strict=True):
                grid.store_rows(out, box, rows, value)
    return o, o_t, lse, mu


def _forward_rows(
    grid: "_Grid", box: Box, rows: slice, q: Tensor, q_t: Maybe, key_side: tuple[Tensor, Tensor, Maybe, Maybe],
    workspace: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, o_t, lse and mu of one tile of query rows; q and q_t come with the scale of (1) and (4) in them.

    MATH.md's streaming form, with the tangent of the scores taken relative to its running mean: `mu` is (5) over the
    keys seen so far and `acc_o_t` the sum of (7) with that `mu`. Each tile moves `mu` by `step`, and `acc_o_t` with it,
    so that a large mean never enters a sum from which it would have to cancel.
    """
    _, v, k_t, v_t = key_side
    has_score_tangent = not (q_t is None and k_t is None)
    acc_o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    acc_o_t = torch.zeros_like(acc_o)
    m = q.new_full((*q.shape[:-1], 1), -torch.inf)
    l, mu = torch.zeros_like(m), torch.zeros_like(m)
    for keys in grid.key_tiles(rows):
        k_n, v_n, k_t_n, v_t_n = (_take(x, keys) for x in key_side)
        S, S_t, product = grid.tiles(workspace, box, rows, keys)
        grid.mask_(_products_(S, (q, k_n)), box, rows, keys)  # (1)
        m_old, m = m, torch.maximum(m, S.amax(-1, keepdim=True))
        p = S.sub_(_finite(m)).exp_()
        alpha = torch.exp(m_old - _finite(m))
        l = l * alpha + p.sum(-1, keepdim=True)
        if has_score_tangent:
            _products_(S_t, (q_t, k_n), (q, k_t_n)).sub_(mu)  # (4), less mu
            step = torch.mul(p, S_t, out=product).sum(-1, keepdim=True) / l.clamp(min=1.0)
            mu = mu + step  # (5)
            acc_o_t.addcmul_(acc_o, step, value=-1.0).mul_(alpha)
            _add_product_(acc_o_t, S_t.sub_(step).mul_(p), v_n)  # (6), (7)
        elif v_t is not None:
            acc_o_t.mul_(alpha)
        _add_product_(acc_o_t, p, v_t_n)  # (7)
        _add_product_(acc_o.mul_(alpha), p, v_n)  # (3)
    l.clamp_(min=1.0)  # 0 in a row without a key; at least 1 in any other, where the largest score adds exp(0)
    lse = torch.cat((m, l.log()), -1) if is_additive(grid.mask) else m + l.log()
    return acc_o.div_(l), acc_o_t.div_(l), lse, mu


def backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Maybe, is_causal: bool, scale: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v; MATH.md (9)-(17) with no tangent."""
    mu = empty_statistic(q)  # which nothing reads without tangents
    grads = backward_jvp(
        d_o, None, q, k, v, None, None, None, o, None, lse, mu, mask, is_causal, scale, (*wanted, False, False, False)
    )
    return grads[0], grads[1], grads[2]


def backward_jvp(
    d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe,
    o: Tensor, o_t: Maybe, lse: Tensor, mu: Tensor, mask: Maybe, is_causal: bool, scale: float,
    wanted: tuple[bool, ...],
) -> tuple[Maybe, ...]:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t; MATH.md (9)-(20). A missing cotangent is zero."""
    grid = _Grid.of(q, k, mask, is_causal)
    grads = tuple(
        empty_rows(like, like.shape[-1]) if want and like is not None else None
        for like, want in zip((q, k, v, q_t, k_t, v_t), wanted, strict=True)
    )
    d_q, d_k, d_v, d_q_t, d_k_t, d_v_t = grads
    workspace = grid.workspace(4, like=q)
    for box in grid.boxes():
        key_side = (grid.load_keys(k, box), grid.load_keys(v, box), grid.load_keys(k_t, box), grid.load_keys(v_t, box))
        key_sums = tuple(grid.zero_keys(x, box) for x in (d_k, d_v, d_k_t, d_v_t))
        for rows in grid.query_tiles():
            q_, q_t_ = scale * grid.load_rows(q, box, rows), _scaled(grid.load_rows(q_t, box, rows), scale)
            query_sums = (grid.zero_rows(d_q, box, rows), grid.zero_rows(d_q_t, box, rows))
            G, T = grid.load_rows(d_o, box, rows), grid.load_rows(d_o_t, box, rows)
            O, O_t = grid.load_rows(o, box, rows), grid.load_rows(o_t, box, rows)
            columns = lse if is_additive(mask) else lse[..., None]
            lse_, mu_ = grid.load_rows(columns, box, rows), grid.load_rows(mu[..., None], box, rows)
            row_a = _row_product(T, O, like=mu_)  # (11)
            row_delta = _row_product(G, O, like=mu_) + _row_product(T, O_t, like=mu_)  # (12)
            statistics = (_finite(lse_), mu_, row_a, row_delta)
            query_side = (q_, q_t_, G, T)
            _backward_rows(grid, box, rows, query_side, statistics, key_side, query_sums, key_sums, workspace)
            for out, query_sum in zip((d_q, d_q_t), query_sums, strict=True):
                grid.store_rows(out, box, rows, _scaled(query_sum, scale))
        for out, key_sum in zip((d_k, d_v, d_k_t, d_v_t), key_sums, strict=True):
            grid.store_keys(out, box, key_sum)
    return grads


def _backward_rows(
    grid: "_Grid", box: Box, rows: slice, query_side: tuple[Tensor, Maybe, Maybe, Maybe],
    statistics: tuple[Tensor, ...], key_side: tuple[Tensor, Tensor, Maybe, Maybe], query_sums: tuple[Maybe, ...],
    key_sums: tuple[Maybe, ...], workspace: Tensor,
) -> None:  # fmt: skip
    """Adds the part of one tile of query rows to the gradients: a sum that is None is not wanted.

    q and q_t come with the scale of (1), (4), (16) and (19) in them; the caller applies that of (15) and (18).
    """
    q, q_t, G, T = query_side
    lse, mu, row_a, row_delta = statistics
    d_q, d_q_t = query_sums
    _, _, k_t, v_t = key_side
    d_k, d_v, d_k_t, _ = key_sums
    has_score_tangent = T is not None and not (q_t is None and k_t is None)
    wants_dS = not (d_q is None and d_k is None) and (G is not None or has_score_tangent or v_t is not None)
    wants_A = has_score_tangent and (wants_dS or not (d_q_t is None and d_k_t is None))
    wants_S_t = has_score_tangent and (wants_dS or d_v is not None)
    for keys in grid.key_tiles(rows):
        k_n, v_n, k_t_n, v_t_n = (_take(x, keys) for x in key_side)
        d_k_n, d_v_n, d_k_t_n, d_v_t_n = (_take(x, keys) for x in key_sums)
        P, S_t, A, B = grid.tiles(workspace, box, rows, keys)
        grid.mask_(_products_(P, (q, k_n)), box, rows, keys)  # (1)
        for part in lse.split(1, -1):
            P.sub_(part)
        P.exp_()  # (2)
        _add_product_(d_v_n, P.mT, G)  # (17)
        _add_product_(d_v_t_n, P.mT, T)  # (20)
        if wants_S_t:
            _products_(S_t, (q_t, k_n), (q, k_t_n)).sub_(mu)  # (4), less mu
        if wants_A:
            _products_(A, (T, v_n)).sub_(row_a)  # (9), less a
        if wants_dS:
            dS = _products_(B, (G, v_n), (T, v_t_n)).sub_(row_delta)  # (10), less delta
            if has_score_tangent:
                dS.addcmul_(S_t, A)
            dS.mul_(P)  # (14)
            _add_product_(d_q, dS, k_n)  # (15)
            _add_product_(d_k_n, dS.mT, q)  # (16)
        if wants_A:
            dS_t = A.mul_(P)  # (13)
            _add_product_(d_q, dS_t, k_t_n)  # (15)
            _add_product_(d_k_n, dS_t.mT, q_t)  # (16)
            _add_product_(d_q_t, dS_t, k_n)  # (18)
            _add_product_(d_k_t_n, dS_t.mT, q)  # (19)
        if has_score_tangent and d_v_n is not None:
            P_t = S_t.mul_(P)  # (6)
            _add_product_(d_v_n, P_t.mT, T)  # (17)


def _products_(out: Tensor, *pairs: tuple[Maybe, Maybe]) -> Tensor:
    """Writes sum a @ b.mT, over the pairs that lack no factor, to out [Z, R, K]; a [Z, R, D], b [Z, K, D].

    Row statistics are subtracted afterwards: added onto them, the products would be rounded to their magnitude D times.
    """
    present = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not present:
        return out.zero_()
    for i, (a, b) in enumerate(present):
        torch.baddbmm(out, a, b.mT, beta=min(i, 1), out=out)
    return out


def _add_product_(acc: Maybe, a: Maybe, b: Maybe) -> None:
    """acc += a @ b, unless acc is not wanted or a factor is missing."""
    if acc is not None and a is not None and b is not None:
        acc.baddbmm_(a, b)


def _finite(x: Tensor) -> Tensor:
    """x with 0 for -inf, the statistic of a row that has no key so far: its scores, all -inf, then give p = 0."""
    return x.masked_fill(x.isneginf(), 0.0)


def _scaled(x: Maybe, scale: float) -> Maybe:
    return None if x is None else x * scale


def _take(x: Maybe, keys: slice) -> Maybe:
    return None if x is None else x[:, keys]


def _row_product(a: Maybe, b: Maybe, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if a is None or b is None else (a * b).sum(-1, keepdim=True)


@dataclass(frozen=True)
class _Grid:
    """The sizes of one call and of its tiles, and how a step reads and writes its part of the operands.

    A step sees [Z, R, K] matrices. Z counts the pairs of a box; R the query rows of a tile, those of the `group` query
    heads that share a key head one after the other; K the keys of a tile. Boxes and tiles are slices, so operands,
    masks and results of any strides and any number of batch dims are read and written in place.
    lead: the batch sizes, then the number of key heads. dtype: the type of computation.
    mask: None or [*batch, Hkv, group, M, N], any of these dims 1.
    """

    lead: tuple[int, ...]
    group: int
    queries: int
    keys: int
    tile_queries: int
    tile_keys: int
    tile_pairs: int
    dtype: torch.dtype
    mask: Maybe
    is_causal: bool

    @staticmethod
    def of(q: Tensor, k: Tensor, mask: Maybe, is_causal: bool) -> "_Grid":
        """The grid of q [*batch, Hq, M, D] and k [*batch, Hkv, N, D]: a short dim leaves room to others."""
        *lead, keys, width = k.shape
        group, queries = q.shape[-3] // max(lead[-1], 1), q.shape[-2]
        most_rows, most_keys = CPU_TILE if q.device.type == "cpu" else DEVICE_TILE
        room = most_rows * most_keys // max(group, 1)
        rows_to_fill = most_rows // max(group, 1) if is_causal else room // max(width, min(keys, most_keys))
        tile_queries = _clamp(rows_to_fill, queries)
        tile_keys = _clamp(room // tile_queries, keys)
        tile_pairs = _clamp(room // tile_queries // max(width, tile_keys), math.prod(lead))
        if mask is not None:
            mask = mask.unsqueeze(-3) if mask.shape[-3] == 1 else mask.unflatten(-3, (lead[-1], group))
        dtype = STATISTIC_DTYPE[q.dtype]
        return _Grid(tuple(lead), group, queries, keys, tile_queries, tile_keys, tile_pairs, dtype, mask, is_causal)

    def boxes(self) -> Iterator[Box]:
        """Slices of at most tile_pairs (batch, key head) pairs that cover all of them, the last dims first."""
        room, slices = self.tile_pairs, []
        for size in reversed(self.lead):
            step = _clamp(room, size)
            room //= step
            slices.append(_slices(size, step))
        return itertools.product(*reversed(slices))

    def query_tiles(self) -> list[slice]:
        return _slices(self.queries, self.tile_queries)

    def key_tiles(self, rows: slice) -> list[slice]:
        """The tiles of keys that any of the query rows may take part with."""
        return _slices(min(self.keys, rows.stop) if self.is_causal else self.keys, self.tile_keys)

    def workspace(self, count: int, like: Tensor) -> Tensor:
        """Memory for `count` tiles of scores at a time."""
        size = self.tile_pairs * self.group * self.tile_queries * self.tile_keys
        return like.new_empty(count, size, dtype=self.dtype)

    def tiles(self, workspace: Tensor, box: Box, rows: slice, keys: slice) -> tuple[Tensor, ...]:
        """The workspace as contiguous [Z, R, K] tiles."""
        shape = (math.prod(_lengths(box)), self.group * _length(rows), _length(keys))
        return workspace[:, : math.prod(shape)].view(-1, *shape).unbind()

    def mask_(self, S: Tensor, box: Box, rows: slice, keys: slice) -> Tensor:
        """Adds the bias of (1) to a contiguous tile of scores: mask, and -inf where the key comes after the query."""
        S_heads = S.view(*_lengths(box), self.group, _length(rows), _length(keys))
        if self.is_causal and keys.stop - 1 > rows.start:
            m = torch.arange(rows.start, rows.stop, device=S.device)
            n = torch.arange(keys.start, keys.stop, device=S.device)
            S_heads.masked_fill_(n > m[:, None], -torch.inf)
        if self.mask is not None:
            wanted = (*box, slice(None), rows, keys)
            pairs = zip(self.mask.shape, wanted, strict=True)
            tile = self.mask[tuple(slice(None) if size == 1 else part for size, part in pairs)]
            if tile.dtype == torch.bool:
                S_heads.masked_fill_(~tile, -torch.inf)
            else:
                S_heads.add_(tile)
        return S

    @overload
    def load_keys(self, x: Tensor, box: Box) -> Tensor: ...
    @overload
    def load_keys(self, x: None, box: Box) -> None: ...
    def load_keys(self, x: Maybe, box: Box) -> Maybe:
        """x [*batch, Hkv, N, width] as [Z, N, width] of dtype, a view where type and strides allow."""
        return None if x is None else x[box].to(self.dtype).reshape(math.prod(_lengths(box)), self.keys, x.shape[-1])

    def zero_keys(self, like: Maybe, box: Box) -> Maybe:
        """Zeros of load_keys(like, box)'s shape."""
        if like is None:
            return None
        return like.new_zeros(math.prod(_lengths(box)), self.keys, like.shape[-1], dtype=self.dtype)

    def store_keys(self, out: Maybe, box: Box, value: Maybe) -> None:
        """Writes what load_keys would read."""
        if out is not None and value is not None:
            out[box] = value.view(*_lengths(box), *value.shape[1:])

    @overload
    def load_rows(self, x: Tensor, box: Box, rows: slice) -> Tensor: ...
    @overload
    def load_rows(self, x: None, box: Box, rows: slice) -> None: ...
    def load_rows(self, x: Maybe, box: Box, rows: slice) -> Maybe:
        """x [*batch, Hq, M, width] as [Z, R, width] of dtype, a view where type and strides allow."""
        if x is None:
            return None
        part = self._heads(x)[(*box, slice(None), rows)]
        return part.to(self.dtype).reshape(math.prod(_lengths(box)), self.group * _length(rows), x.shape[-1])

    def zero_rows(self, like: Maybe, box: Box, rows: slice) -> Maybe:
        """Zeros of load_rows(like, box, rows)'s shape."""
        if like is None:
            return None
        return like.new_zeros(math.prod(_lengths(box)), self.group * _length(rows), like.shape[-1], dtype=self.dtype)

    def store_rows(self, out: Maybe, box: Box, rows: slice, value: Maybe) -> None:
        """Writes what load_rows would read."""
        if out is not None and value is not None:
            shape = (*_lengths(box), self.group, _length(rows), value.shape[-1])
            self._heads(out)[(*box, slice(None), rows)] = value.view(shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-3, (self.lead[-1], self.group))


def _clamp(value: int, most: int) -> int:
    return max(1, min(value, most))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _lengths(box: Box) -> list[int]:
    return [_length(part) for part in box]


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
