"""All rows of a tensor whose rows are divided over a group (all-gather), and the gradient of that (reduce-scatter)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..layout import STATISTIC_DTYPE
from . import messages
from .messages import Group
from .positions import Spans, neighbours, size


def gathered(x: Tensor, group: Group, places: Sequence[Spans]) -> Tensor:
    """x [rows, ...] of this rank to [all rows, ...], of which rank r has those of places[r]."""
    whole: Tensor = _Gathered.apply(x, group, places)
    return whole


class _Gathered(Function):
    """(x, group, places) -> all rows."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, group: Group, places: Sequence[Spans]) -> Tensor:
        return _all_rows(x, group, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.places = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Reduced.apply(grad, ctx.group, ctx.places), None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor, *_: Any) -> Tensor:
        return _Gathered.apply(x_t, ctx.group, ctx.places)


class _Reduced(Function):
    """(all rows, group, places) -> the sum over ranks of this rank's rows: what _Gathered is transposed."""

    @staticmethod
    def forward(x: Tensor, group: Group, places: Sequence[Spans]) -> Tensor:
        return _sum_of_rows(x, group, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.places = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Gathered.apply(grad, ctx.group, ctx.places), None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor, *_: Any) -> Tensor:
        return _Reduced.apply(x_t, ctx.group, ctx.places)


def _all_rows(x: Tensor, group: Group, places: Sequence[Spans]) -> Tensor:
    sizes = [size(spans) for spans in places]
    shapes = [[(rows, *x.shape[1:])] for rows in sizes]
    parts = messages.swap(group, [[x]] * group.size, shapes, x)
    whole = x.new_empty(sum(sizes), *x.shape[1:])
    for (part,), spans in zip(parts, places, strict=True):
        for span, rows in zip(spans, neighbours([len(span) for span in spans]), strict=True):
            whole[span.start : span.stop] = part[rows.start : rows.stop]  # mutate: whole
    return whole


def _sum_of_rows(x: Tensor, group: Group, places: Sequence[Spans]) -> Tensor:
    sent = [[x[span.start : span.stop] for span in spans] for spans in places]
    shapes = [(len(span), *x.shape[1:]) for span in places[group.rank]]
    parts = messages.swap(group, sent, [shapes] * group.size, x)
    kind = STATISTIC_DTYPE.get(x.dtype, x.dtype)
    total = x.new_zeros(size(places[group.rank]), *x.shape[1:], dtype=kind)
    for part in parts:
        total += torch.cat(part) if part else 0
    return total.to(x.dtype)
