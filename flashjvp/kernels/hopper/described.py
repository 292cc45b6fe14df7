"""The operands of a call as descriptors of their column chunks (descriptors.py)."""

from typing import Any

import torch
from torch import Tensor

from ...layout import empty_rows, zero_rows
from ..launch import schedule
from ..launch.call import Call, Maybe
from . import eligibility
from .descriptors import rows_descriptors, sequences_descriptors
from .per_tensor_scaling import KernelOperands

CONSUMER_ROWS = 64


def describe(call: Call) -> Any:
    """What makes the descriptors of a tensor: rows of batch entries, or of packed sequences."""
    return rows_descriptors if call.sequences is None else sequences_descriptors


def value_widths(given: KernelOperands) -> tuple[int, ...]:
    """The column chunks of v and o in the forward pass."""
    narrow = None if given.tensor_scales is not None else eligibility.narrow_values(given.call)
    return schedule.pipeline_chunks(given.call.width) if narrow is None else (narrow,)


def described(call: Call, rows: int, *tensors: Maybe, widths: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """Two descriptors of each tensor, for the column chunks; None for those that there are not. `widths` are theirs, by
    default those of the padded head dim."""
    widths, of_rows = widths or schedule.pipeline_chunks(call.width), describe(call)
    found: list[Any] = []
    for x in tensors:
        chunks = [] if x is None else of_rows(x, rows, widths)  # mutate: chunks
        found += (*chunks, None, None)[:2]
    return tuple(found)


def written(given: KernelOperands, *tensors: Maybe, widths: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """Likewise of results. float32 ones are written through 16-bit tiles, half of the columns at a time: results.py."""
    if given.tensor_scales is None or all(x is None or x.dtype != torch.float32 for x in tensors):
        return described(given.call, CONSUMER_ROWS, *tensors, widths=widths)
    widths = schedule.pipeline_chunks(given.call.width)
    found: list[Any] = []
    for x in tensors:
        chunks = [] if x is None else rows_descriptors(x, CONSUMER_ROWS, [columns // 2 for columns in widths])
        found += (*chunks, None, None)[:2]
    return tuple(found)


def empty_result(call: Call, like: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """A result. Rows that belong to no packed sequence are zeros: nobody can tell on the host whether there are any."""
    return empty_rows(like, width, dtype) if call.sequences is None else zero_rows(like, width)
