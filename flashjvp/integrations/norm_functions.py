"""What stands for `F.layer_norm`, `torch.layer_norm` and `F.batch_norm`: those of norms.py, in a context with norms."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import norms
from .active import present

if TYPE_CHECKING:
    from .replaced import Replaced

Maybe = Tensor | None
STOCK_LAYER_NORM, STOCK_TORCH_LAYER_NORM, STOCK_BATCH_NORM = F.layer_norm, torch.layer_norm, F.batch_norm


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5
) -> Tensor:
    """PyTorch's function, or in a context with norms `flashjvp.layer_norm`."""
    context = present()
    if context is None or not context.norms:
        return STOCK_LAYER_NORM(input, normalized_shape, weight, bias, eps)
    _count(context, "layer_norm", (input, weight, bias))
    return norms.layer_norm(input, normalized_shape, weight, bias, eps)


def torch_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    """The same for `torch.layer_norm`."""
    context = present()
    if context is None or not context.norms:
        return STOCK_TORCH_LAYER_NORM(input, normalized_shape, weight, bias, eps, cudnn_enable)
    _count(context, "layer_norm", (input, weight, bias))
    return norms.layer_norm(input, normalized_shape, weight, bias, eps)


def batch_norm(
    input: Tensor, running_mean: Maybe, running_var: Maybe, weight: Maybe = None, bias: Maybe = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """PyTorch's function, or in a context with norms `flashjvp.batch_norm`."""
    context = present()
    rest = (running_mean, running_var, weight, bias, training, momentum, eps)
    if context is None or not context.norms or not training:
        return STOCK_BATCH_NORM(input, *rest)
    _count(context, "batch_norm", (input, weight, bias))
    return norms.batch_norm(input, *rest)


def _count(context: "Replaced", name: str, tensors: Any) -> None:
    context.report_of.add(name, "flashjvp", "right under a JVP, PyTorch's own without")
