"""Arguments of kernels: what a launch takes of a tensor, and the little of it that decides about the compiled code.

Triton compiles anew for another alignment of an address, divisibility of a stride or width of an integer. Few of these
differences make other code here, so arguments are put into as few classes as there are codes (`Special`), and kernels
are compiled for an example of each class, never for the tensors of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tiles import Operand, odd

# What of an argument changes with the tensors of a call: an address, and the strides or the descriptor that go with it.
Address = tuple[int, tuple[int | float, ...] | None, Any]

_LONG = 1 << 31


@dataclass(frozen=True, eq=False)
class Special:
    """A class of arguments with the same code. There is one object for each: cheap to hash.

    dtype: of the tensor. is_aligned: its address is a multiple of 16 bytes. numbers: how many integers an Operand
    carries, none for a plain tensor. is_sixteenth: the first of them, the row stride, is a multiple of 16. is_long:
    they are 64 bits wide.
    """

    dtype: torch.dtype
    is_aligned: bool
    numbers: int = 0
    is_sixteenth: bool = False
    is_long: bool = False

    def example(self) -> Any:
        """What Triton compiles for: an argument of this class, without numbers that anybody reads."""
        pointer = _memory(self.dtype)[0 if self.is_aligned else 1 :]
        if not self.numbers:
            return pointer
        others = odd(_LONG if self.is_long else 0)
        row = (_LONG if self.is_long else 0) + (16 if self.is_sixteenth else 24)
        return Operand(pointer, (row, *(others,) * (self.numbers - 1)))


special = cache(Special)


@cache
def _memory(dtype: torch.dtype) -> Tensor:
    with torch.device("cpu"):
        return torch.empty(64, dtype=dtype)


class Argument(NamedTuple):
    """An argument of a kernel.

    A launch takes addresses (and the strides of an Operand) in place of tensors, and so need not ask the driver about
    them.
    """

    tensor: Any  # or a descriptor of one
    raw: Any  # what a launch of the compiled kernel takes
    special: Any  # a Special; of a descriptor its tile, from which the rest follows

    def given(self) -> Any:
        """As the interpreter takes it."""
        return Operand(self.tensor, self.raw[1]) if isinstance(self.raw, tuple) else self.tensor

    def address(self) -> Address:
        """The address that a launch takes, and the strides of an Operand or the descriptor beside it."""
        raw = self.raw
        if isinstance(raw, int):
            return raw, None, None
        if isinstance(raw, tuple):
            address, strides = raw
            return address, strides, None
        return raw.base.data_ptr(), None, raw


class Layout(NamedTuple):
    """What the strides, the width and the type of a tensor say about an Operand."""

    strides: tuple[int, ...]  # of the Operand
    bits: int  # that any stride but the column's has
    is_regular: bool  # rows start at multiples of 16 bytes, and 32 bits hold the offsets in a tile
    special: tuple[Special, Special]  # without and with an address that 16 divides


@lru_cache(1 << 14)
def layout(strides: tuple[int, ...], dtype: torch.dtype, width: int = 0) -> Layout:
    """Of [*batch, head, row, column] strides (without batch dims, one of 0) and so many columns.

    A row stride counts as a multiple of 16 only where the width is one: rows of 72 columns lie 72 elements apart, or 72
    for each of 16 heads, and one compilation serves both.
    """
    *batch, head, row, _ = strides
    packed = (row, odd(head), *(map(odd, reversed(batch)) if batch else (odd(0),)))
    bits = 0
    for stride in strides[:-1]:
        bits |= stride
    is_regular = bits * dtype.itemsize % 16 == 0 and row < 1 << 23
    of = len(packed), row % 16 == 0 and width % 16 == 0, any(x >= _LONG for x in packed)
    return Layout(packed, bits, is_regular, (special(dtype, False, *of), special(dtype, True, *of)))


def statistic(x: Tensor) -> Argument:
    """A row statistic, which kernels read as contiguous: one that vmap expanded is copied."""
    x = x.contiguous()  # mutate: x
    address = x.data_ptr()
    return Argument(x, address, special(x.dtype, address % 16 == 0))


def argument(x: Any) -> Argument:
    """What a launch takes of an argument."""
    if isinstance(x, Argument):
        return x
    if isinstance(x, Tensor):
        return statistic(x)
    return Argument(x, x, tuple(x.block_shape))  # a descriptor, whose layout follows from the type and the tile


def alike(specials: Sequence[Special | Any], is_regular: bool) -> tuple[Any, ...]:
    """The classes of the arguments of a launch, as few as will do: integers of all Operands are equally wide, and
    where rows start anywhere (not `is_regular`), all addresses count as the least aligned one, and so do strides."""
    operands = [x for x in specials if isinstance(x, Special) and x.numbers]
    is_long = any(x.is_long for x in operands)
    if is_regular and not is_long:
        return tuple(specials)
    aligned = is_regular or all(x.is_aligned for x in operands)
    sixteenth = is_regular or (aligned and all(x.is_sixteenth for x in operands))

    def of(x: Any) -> Any:
        if not isinstance(x, Special) or not x.numbers:
            return x
        return special(x.dtype, x.is_aligned and aligned, x.numbers, x.is_sixteenth and sixteenth, is_long)

    return tuple([of(x) for x in specials])


def read_singly(classes: tuple[Special, Special]) -> Special:
    """The one class of tensors that kernels read number by number, wherever they lie."""
    return special(classes[0].dtype, False, classes[0].numbers, False, classes[0].is_long)


def examples(arguments: Sequence[Argument | None], classes: Sequence[Any]) -> list[Any]:
    """What Triton compiles for in the place of arguments of these classes. Descriptors stand for themselves."""
    return [
        None if x is None else x.tensor if isinstance(of, tuple) else of.example()
        for x, of in zip(arguments, classes, strict=True)
    ]


class OfDropout:
    """The class of every seed with the numbers that go with it."""

    def example(self) -> Operand:
        """As of Special."""
        return Operand(_memory(torch.int64)[1:], (3, 0.5))


_OF_DROPOUT = OfDropout()


def seed_operand(seed: Tensor, threshold: int, factor: float) -> Argument:
    """The seeds of dropout, and what they do not decide: ordinary numbers, so that no rate compiles anew."""
    return Argument(seed, (seed.data_ptr(), (threshold, factor)), _OF_DROPOUT)
