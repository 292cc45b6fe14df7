"""Where the fused kernels apply. Elsewhere the formulas of `dual` serve, with the same results up to rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashjvp import environment

TYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = {"cuda"}  # tests add "cpu", where Triton interprets the kernels


def applies(tensors: Sequence[Tensor | None]) -> bool:
    """Whether kernels are to serve these tensors: on a GPU, with Triton, in reverse mode alone, and not empty.

    Without gradients formulas do: what inductor makes of them is as fast in a forward pass (docs/performance-log.md).
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in given)
        and all(x.device.type in DEVICES and x.dtype in TYPES and x.numel() > 0 for x in given)
        and _may_run(given[0].device)
    )


@torch.compiler.assume_constant_result
def _may_run(device: torch.device) -> bool:
    """Whether the device runs the kernels, and nothing but reverse mode looks at what is called.

    An exported program holds PyTorch's operators only; torch.func's transforms and forward mode need formulas. All this
    is a constant for torch.compile, which guards the transforms by itself and would take `is_exporting` for true.
    """
    # Names of PyTorch's own: where a release lacks one, the formulas serve.
    in_transform = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    transformed = in_transform() or getattr(forward_ad, "_current_level", 0) >= 0
    return environment.has_triton() and _is_fit(device) and not transformed and not torch.compiler.is_exporting()


def _is_fit(device: torch.device) -> bool:
    """Whether a GPU copies to shared memory on the side; without one, Triton interprets kernels."""
    return device.type != "cuda" or (not environment.is_amd() and environment.capability(device.index) >= (8, 0))


def all_or_none(tangents: Sequence[Tensor | None]) -> bool:
    """Whether all tangents are there, or none is."""
    return len({tangent is None for tangent in tangents}) == 1
