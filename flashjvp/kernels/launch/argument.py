"""Arguments of kernels: what a launch takes of a tensor, and the little of it that decides about the compiled code.

Triton compiles anew for another alignment of an address, divisibility of a stride or width of an integer. Few of these
differences make other code here, so arguments are put into as few classes as there are codes (`Special`), and kernels
are compiled for an example of each class, never for the tensors of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..tiles import Operand, odd

# What of an argument changes with the tensors of a call: an address, and the strides or the descriptor that go with it.
Address = tuple[int, tuple[int | float, ...] | None, Any]

LONG = 1 << 31  # an integer from here on takes 64 bits


@dataclass(frozen=True, eq=False)
class Special:
    """A class of arguments with the same code. There is one object for each: cheap to hash.

    dtype: of the tensor. numbers: how many integers an Operand carries, none for a plain tensor. is_aligned: the
    address of a plain tensor is a multiple of 16 bytes. is_long: the integers are 64 bits wide.

    Where an Operand starts and how far apart its rows are makes no other class: what kernels make use of, REGULAR and
    MASK_LAYOUT promise.
    """

    dtype: torch.dtype
    numbers: int = 0
    is_aligned: bool = False
    is_long: bool = False

    def example(self) -> Any:
        """What Triton compiles for: an argument of this class, without numbers that anybody reads."""
        pointer = _memory(self.dtype)[0 if self.is_aligned else 1 :]
        if not self.numbers:
            return pointer
        least = LONG if self.is_long else 0
        return Operand(pointer, (least + 24, *(odd(least),) * (self.numbers - 1)))


special = cache(Special)


@cache
def _memory(dtype: torch.dtype) -> Tensor:
    with torch.device("cpu"):
        return torch.empty(64, dtype=dtype)


# An argument of a kernel: the tensor, or a descriptor of one; what a launch of the compiled kernel takes; its class, a
# Special, or of a descriptor its type and tile, from which the rest follows. A launch takes addresses (and the strides
# of an Operand) in place of tensors, and so need not ask the driver about them. A plain tuple, since a launch makes up
# to 20, and a record takes eight times as long to make.
Argument = tuple[Any, Any, Any]
ABSENT: Argument = (None, None, None)


def argument(x: Any) -> Argument:
    """What a launch takes of a tensor or a descriptor."""
    if isinstance(x, Tensor):
        return statistic(x)
    return x, x, (x.base.dtype, *x.block_shape)  # a descriptor, whose layout follows from the type and the tile


def statistic(x: Tensor) -> Argument:
    """A row statistic, which kernels read as contiguous: one that vmap expanded is copied."""
    x = x if x.is_contiguous() else x.contiguous()  # mutate: x
    address = x.data_ptr()
    return x, address, special(x.dtype, 0, address % 16 == 0)


def interpreted(tensor: Any, raw: Any) -> Any:
    """An argument as the interpreter takes it."""
    if isinstance(raw, tuple):
        _, strides = raw
        return Operand(tensor, strides)
    return tensor


def address_of(raw: Any) -> Address | None:
    """The address that a launch takes, and the strides of an Operand or the descriptor beside it."""
    if raw is None:
        return None
    if isinstance(raw, int):
        return raw, None, None
    if isinstance(raw, tuple):
        address, strides = raw
        return address, strides, None
    return raw.base.data_ptr(), None, raw


def examples(tensors: Sequence[Any], classes: Sequence[Any]) -> list[Any]:
    """What Triton compiles for in the place of arguments of these classes. Descriptors stand for themselves."""
    return [
        None if of is None else tensor if isinstance(of, tuple) else of.example()
        for tensor, of in zip(tensors, classes, strict=True)
    ]


class OfDropout:
    """The class of every seed with the numbers that go with it."""

    def example(self) -> Operand:
        """As of Special."""
        return Operand(_memory(torch.int64)[1:], (3, 0.5))


_OF_DROPOUT = OfDropout()


def seed_operand(seed: Tensor, threshold: int, factor: float) -> Argument:
    """The seeds of dropout, and what they do not decide: ordinary numbers, so that no rate compiles anew."""
    return seed, (seed.data_ptr(), (threshold, factor)), _OF_DROPOUT
