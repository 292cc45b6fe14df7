"""What stands for PyTorch's layer, batch, instance and group norms: those of norms.py, in a context with norms.

`torch.layer_norm` is what `F.layer_norm` calls, and so for the others. Both are replaced: torch.compile does not look
into the second.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import norms
from .active import present

Maybe = Tensor | None
STOCK_LAYER_NORM, STOCK_BATCH_NORM, STOCK_INSTANCE_NORM = F.layer_norm, F.batch_norm, F.instance_norm
TORCH_LAYER_NORM, TORCH_BATCH_NORM = torch.layer_norm, torch.batch_norm
TORCH_INSTANCE_NORM: Any = torch.instance_norm
STOCK_GROUP_NORM, TORCH_GROUP_NORM = F.group_norm, torch.group_norm


def _is_replaced(name: str) -> bool:
    """Whether this thread is in a context with norms, which counts the call."""
    context = present()
    if context is None or not context.norms:
        return False
    context.report_of.add(name, "flashjvp", "PyTorch's own where there is no tangent")
    return True


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5
) -> Tensor:
    """PyTorch's function, or in a context with norms `flashjvp.layer_norm`."""
    if not _is_replaced("layer_norm"):
        return STOCK_LAYER_NORM(input, normalized_shape, weight, bias, eps)
    return norms.layer_norm(input, normalized_shape, weight, bias, eps)


def torch_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    """The same for `torch.layer_norm`."""
    if not _is_replaced("layer_norm"):
        return TORCH_LAYER_NORM(input, normalized_shape, weight, bias, eps, cudnn_enable)
    return norms.layer_norm(input, normalized_shape, weight, bias, eps)


def batch_norm(
    input: Tensor, running_mean: Maybe, running_var: Maybe, weight: Maybe = None, bias: Maybe = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """PyTorch's function, or in a context with norms `flashjvp.batch_norm`."""
    rest = (training, momentum, eps)
    if not training or not _is_replaced("batch_norm"):
        return STOCK_BATCH_NORM(input, running_mean, running_var, weight, bias, *rest)
    return norms.batch_norm(input, running_mean, running_var, weight, bias, *rest)


def torch_batch_norm(
    input: Tensor, weight: Maybe, bias: Maybe, running_mean: Maybe, running_var: Maybe, training: bool, momentum: float,
    eps: float, cudnn_enabled: bool,
) -> Tensor:  # fmt: skip
    """The same for `torch.batch_norm`."""
    rest = (training, momentum, eps)
    if not training or not _is_replaced("batch_norm"):
        return TORCH_BATCH_NORM(input, weight, bias, running_mean, running_var, *rest, cudnn_enabled)
    return norms.batch_norm(input, running_mean, running_var, weight, bias, *rest)


def instance_norm(
    input: Tensor, running_mean: Maybe = None, running_var: Maybe = None, weight: Maybe = None, bias: Maybe = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """PyTorch's function, or in a context with norms that of norms.py, by way of `torch.instance_norm`."""
    rest: tuple[Any, ...] = (use_input_stats, momentum, eps)
    if not torch.compiler.is_compiling() or not _is_replaced("instance_norm"):
        return STOCK_INSTANCE_NORM(input, running_mean, running_var, weight, bias, *rest)
    return norms.instance_norm(input, weight, bias, running_mean, running_var, *rest)


def torch_instance_norm(
    input: Tensor, weight: Maybe, bias: Maybe, running_mean: Maybe, running_var: Maybe, use_input_stats: bool,
    momentum: float, eps: float, cudnn_enabled: bool,
) -> Tensor:  # fmt: skip
    """The same for `torch.instance_norm`."""
    rest: tuple[Any, ...] = (use_input_stats, momentum, eps)
    if not _is_replaced("instance_norm"):
        return TORCH_INSTANCE_NORM(input, weight, bias, running_mean, running_var, *rest, cudnn_enabled)
    return norms.instance_norm(input, weight, bias, running_mean, running_var, *rest)


def group_norm(input: Tensor, num_groups: int, weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5) -> Tensor:
    """PyTorch's function, by way of `torch.group_norm`; in a context with norms that of norms.py."""
    if not torch.compiler.is_compiling() or not _is_replaced("group_norm"):
        return STOCK_GROUP_NORM(input, num_groups, weight, bias, eps)
    return norms.group_norm(input, num_groups, weight, bias, eps)


def torch_group_norm(
    input: Tensor, num_groups: int, weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    """The same for `torch.group_norm`."""
    if not _is_replaced("group_norm"):
        return TORCH_GROUP_NORM(input, num_groups, weight, bias, eps, cudnn_enabled)
    return norms.group_norm(input, num_groups, weight, bias, eps)
