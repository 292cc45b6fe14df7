"""Linear layers in float8, with the products of torchao (the extra `float8`).

Micikevicius et al., arXiv 2209.05433: both factors of a product are rounded to 8 bits, gradients of outputs to e5m2 and
everything else to e4m3, each tensor divided by a scale of its own so that its largest number is the type's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dual import Linear, Maybe

CAPABILITY = (8, 9)  # from which on a GPU multiplies them


def linear_on(device: torch.device) -> Linear:
    """`F.linear` with its three products (of the forward pass, of both gradients) in float8, under autocast.

    y = x @ weight.T + bias for x [..., in], weight [out, in], bias [out]; in and out are multiples of 16. y has
    the type of autocast; without autocast it is `F.linear`. Differentiable in reverse mode, once. A tangent is
    multiplied by a call of its own, and has a scale of its own. On CPUs and GPUs without such products the rounding is
    the same and the time that of float32.

    Raises: ImportError without torchao.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    emulate = device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY
    layers = nn.Sequential(nn.Linear(16, 16, device="meta"))
    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # pads rows where 16 does not divide them
    layer = convert_to_float8_training(layers, config=settings)[0]
    kind, how = device.type, (layer.linear_mm_config, layer.config)

    def linear(x: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
        if not torch.is_autocast_enabled(kind):
            return F.linear(x, weight, bias)
        y = matmul_with_hp_or_float8_args.apply(x.to(torch.get_autocast_dtype(kind)), weight.t(), *how)
        return y if bias is None else y + bias.to(y.dtype)

    return linear
