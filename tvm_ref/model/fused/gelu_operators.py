"""The operators `tvm_ref::gelu` and `tvm_ref::gelu_backward`: the kernels of kernels/gelu.py for the dispatcher.

A call without tangents has None for theirs, and no results for them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .library import Maybe, define

NUMBERS = 2048  # of a tensor, at a time in a program
CHANNELS = 512  # of a program of the backward pass
ROWS = 128  # of these
WARPS = 4


class Forward(NamedTuple):
    """h [..., C]."""

    h: Tensor
    h_t: Maybe


class Backward(NamedTuple):
    """The same, and the gradients of the result."""

    h: Tensor
    h_t: Maybe
    dy: Tensor
    dy_t: Maybe


def _forward_results(given: Forward) -> list[Maybe]:
    """y, y_t."""
    return [given.h.new_empty(given.h.shape), None if given.h_t is None else given.h_t.new_empty(given.h.shape)]


def _forward(given: Forward, results: list[Maybe]) -> None:
    from .kernels.gelu import gelu_forward_kernel

    numbers = given.h.numel()
    gelu_forward_kernel[(-(-numbers // NUMBERS),)](
        *_pointers(given, results), numbers, BLOCK=NUMBERS, TANGENT=given.h_t is not None, num_warps=WARPS
    )


def _backward_results(given: Backward) -> list[Maybe]:
    """dh, dh_t, and sums, of dh over the rows of each program (gelu_backward_kernel)."""
    dh, dh_t = _forward_results(Forward(given.h, given.h_t))
    channels = given.h.shape[-1]
    parts = -(-given.h.numel() // channels // ROWS)
    return [dh, dh_t, given.h.new_empty(parts, channels, dtype=torch.float32)]


def _backward(given: Backward, results: list[Maybe]) -> None:
    from .kernels.gelu import gelu_backward_kernel

    *_, sums = results
    assert sums is not None
    parts, channels = sums.shape
    gelu_backward_kernel[(-(-channels // CHANNELS), parts)](
        *_pointers(given, results),
        given.h.numel() // channels,
        channels,
        ROWS=ROWS,
        EACH=NUMBERS // CHANNELS,
        BLOCK=CHANNELS,
        TANGENT=given.h_t is not None,
        num_warps=WARPS,
    )


def _pointers(given: Forward | Backward, results: list[Maybe]) -> list[Tensor]:
    """All tensors, with h in place of those that the call does not have."""
    return [(given.h if tensor is None else tensor).contiguous() for tensor in (*given, *results)]


gelu = define("gelu", Forward, _forward_results, _forward)
gelu_backward = define("gelu_backward", Backward, _backward_results, _backward)
