"""A classifier of ImageNet with random weights, under the names and shapes of the published file."""

import torch
from torch import Tensor

from tvm_ref.quality.imagenet_classifier import _shapes


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """A state dict whose activations neither grow nor vanish."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in _shapes():
        x = torch.randn(shape, generator=draw)
        if len(shape) > 1:
            x *= (2 / x[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn0.weight", "bn1.weight", "bn2.weight")):
            x = 1 + 0.1 * x.abs()
        else:
            x *= 0.1
        weights[name] = x
        if name.endswith("running_var"):
            weights[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return weights
