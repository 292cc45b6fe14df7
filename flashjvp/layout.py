"""How results are laid out in memory: one rule for every backend and for the fake rules of the operators."""

from functools import lru_cache

import torch
from torch import Tensor

STATISTIC_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def empty_rows(like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten tensor `[*like.shape[:-1], width]`, of `like`'s dtype unless given another, that keeps the order of its
    head and row dims.

    Where `like` [..., H, M, D] is a view of `[..., M, H, D]` memory (packed projections), the result is one too, so
    that `o.transpose(-2, -3).flatten(-2)` stays a view; otherwise it is contiguous.
    """
    if type(like) is Tensor:  # its sizes are numbers, not symbols
        return like.new_empty_strided(*_known_rows(like.shape, like.stride(), width), dtype=dtype)
    return _empty_rows(like, width, dtype)


def zero_rows(like: Tensor, width: int) -> Tensor:
    """Zeros, laid out by `empty_rows(like, width)`."""
    if like.ndim >= 3 and like.stride(-3) < like.stride(-2):
        *batch, heads, length, _ = like.shape
        return like.new_zeros(*batch, length, heads, width).transpose(-2, -3)
    return like.new_zeros(*like.shape[:-1], width)


def _empty_rows(like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = (*like.shape[:-1], width)
    if like.ndim >= 3 and like.stride(-3) < like.stride(-2):
        swapped = (*shape[:-3], shape[-2], shape[-3], width)
        return like.new_empty(swapped, dtype=dtype).transpose(-2, -3)
    return like.new_empty(shape, dtype=dtype)


@lru_cache(1 << 14)
def _known_rows(shape: tuple[int, ...], strides: tuple[int, ...], width: int) -> tuple[tuple[int, ...], ...]:
    """Shape and strides of `_empty_rows`, which takes several times as long as looking them up."""
    rows = _empty_rows(torch.empty_strided(shape, strides, device="meta"), width)
    return rows.shape, rows.stride()


def rows(value: Tensor, like: Tensor) -> Tensor:
    """`value` rounded to `like`'s dtype and laid out by `empty_rows(like, ...)`."""
    return empty_rows(like, value.shape[-1]).copy_(value)


def empty_statistic(q: Tensor) -> Tensor:
    """Unwritten row statistic `[..., Hq, M]` of q: float32, or float64 for float64 queries."""
    return _empty_of_rows(q, q.shape[:-1])


def empty_lse(q: Tensor, mask: Tensor | None) -> Tensor:
    """Unwritten log-sum-exp of the scores of each query: `[..., Hq, M]`, or `[..., Hq, M, 2]` with an additive mask.

    The two numbers are the largest score m and log(sum(exp(S - m))). Their sum would not do: next to a bias of -1e9 the
    second one rounds away, and with it the number of keys that share the row (MATH.md, section 6).
    """
    shape = (*q.shape[:-1], 2) if is_additive(mask) else q.shape[:-1]
    return _empty_of_rows(q, shape)


def _empty_of_rows(q: Tensor, shape: tuple[int, ...]) -> Tensor:
    if type(q) is Tensor:  # as above; `new_empty` takes twice as long
        return q.new_empty_strided(shape, _contiguous(shape), dtype=STATISTIC_DTYPE[q.dtype])
    return q.new_empty(shape, dtype=STATISTIC_DTYPE[q.dtype])


@lru_cache(1 << 14)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def empty_bias(mask: Tensor) -> Tensor:
    """Unwritten gradient of an additive mask or of its tangent: of its shape and dtype, contiguous."""
    return mask.new_empty(mask.shape)


def is_additive(mask: Tensor | None) -> bool:
    """Whether a mask is a bias on the scores, rather than a choice of keys."""
    return mask is not None and mask.is_floating_point()
