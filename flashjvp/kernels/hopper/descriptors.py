"""Tensor descriptors, as the kernels here take them."""

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def rows_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows of a [batch, heads, rows, D] tensor of 16-bit numbers."""
    layout = gl.NVMMASharedLayout(min(2 * x.shape[-1], 128), 16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]], layout)


def statistics_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of the four statistics of `rows` rows, of packed [batch * heads * 4, rows]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [4, rows], gl.NVMMASharedLayout(0, 32))
