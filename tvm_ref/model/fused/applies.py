"""Where the fused kernels apply. Elsewhere the formulas of `dual` serve, with the same results up to rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashjvp import environment

TYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = {"cuda"}  # tests add "cpu", where Triton interprets the kernels


def applies(tensors: Sequence[Tensor | None]) -> bool:
    """Whether kernels may serve these tensors: on a GPU, with Triton, in reverse mode alone, and not empty.

    An exported program holds PyTorch's operators only.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        environment.has_triton()
        and all(x.device.type in DEVICES and x.dtype in TYPES and x.numel() > 0 for x in given)
        and not _is_recorded_or_transformed()
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_recorded_or_transformed() -> bool:
    """Whether torch.export, a transform of torch.func or a level of forward mode looks at what is called.

    A constant for torch.compile, which guards these levels itself; it would take `is_exporting` for true.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch.compiler.is_exporting()


def all_or_none(tangents: Sequence[Tensor | None]) -> bool:
    """Whether all tangents are there, or none is."""
    return len({tangent is None for tangent in tangents}) == 1
