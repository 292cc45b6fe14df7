"""Tensor descriptors, as the kernels here take them: what TMA copies, and in tiles of which shape."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_MOST = 0x7FFF0000  # of a dim, as long as any


def rows_descriptors(x: Tensor, rows: int, widths: Sequence[int]) -> list[TensorDescriptor]:
    """Tiles of `rows` rows of a [batch, heads, rows, D] or [heads, rows, D] tensor, by column chunks.

    The widths of the chunks are powers of two and cover D.
    """
    shape, strides = list(x.shape), list(x.stride())  # mutate: shape, strides
    if len(shape) == 3:
        shape, strides = [1, *shape], [shape[0] * strides[0], *strides]
    return _in_chunks(x, shape, strides, rows, widths)


def sequences_descriptors(x: Tensor, rows: int, widths: Sequence[int]) -> list[TensorDescriptor]:
    """`rows_descriptors` of the entries of packed sequences (band_place.py).

    Row r of entry e is row e + r - 2^30 of the tensor. TMA has no negative coordinates, but addresses of 64 bits that
    wrap around: coordinate 2^30 of the first dim moves all by -2^30 rows, as in triton/tools/ragged_tma.py.
    """
    heads, length, width = x.shape[-3:]
    head, row, column = x.stride()[-3:]
    shape, strides = [_MOST, _MOST, heads, length, width], [(1 << 34) - row, row, head, row, column]
    return _in_chunks(x, shape, strides, rows, widths)


def _in_chunks(
    x: Tensor, shape: Sequence[int], strides: Sequence[int], rows: int, widths: Sequence[int]
) -> list[TensorDescriptor]:
    size, outer = x.element_size(), [1] * (len(shape) - 2)
    return [_descriptor(x, shape, strides, [*outer, rows, w], _layout(min(size * w, 128), 8 * size, 4)) for w in widths]


def statistics_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of the four statistics of `rows` rows, of packed [batch * heads * 4, rows]."""
    return _descriptor(x, list(x.shape), list(x.stride()), [4, rows], _layout(0, 32, 2))


def _descriptor(x: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int], layout: Any) -> Any:
    """Without the checks of the constructor, which `eligibility.fits` has made and which take longer than a launch."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape, made.layout = x, shape, strides, block, layout
    return made


@cache
def _layout(swizzled_bytes: int, bits: int, rank: int) -> Any:
    return gl.NVMMASharedLayout(swizzled_bytes, bits, rank=rank)
