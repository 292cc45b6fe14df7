"""How the layers of a `dit.DiT` start, and its position embedding; Zhou et al., arXiv 2511.19797."""

from typing import TypeVar

import torch
from torch import Tensor, nn

STD = 0.02
POSITION_PERIOD = 10000.0

Affine = TypeVar("Affine", nn.Linear, nn.Conv2d)


def spectral(layer: Affine) -> Affine:
    """The layer with zero biases and a weight of spectral norm 1: Xavier-normal numbers, as a matrix [out, rest],
    divided by its largest singular value."""
    with torch.no_grad():
        matrix = layer.weight.flatten(1)
        nn.init.xavier_normal_(matrix)
        layer.weight.copy_((matrix / torch.linalg.matrix_norm(matrix, ord=2)).view_as(layer.weight))
    return _without_bias(layer)


def normal(layer: nn.Linear) -> nn.Linear:
    """The layer with zero biases and weights N(0, 0.02^2)."""
    nn.init.normal_(layer.weight, std=STD)
    return _without_bias(layer)


def zero(layer: nn.Linear) -> nn.Linear:
    """The layer with zero biases and weights."""
    nn.init.zeros_(layer.weight)
    return _without_bias(layer)


def position_embedding(grid: int, width: int) -> Tensor:
    """[1, grid * grid, width] in torch's default dtype, tokens row by row: the column in the first half of the
    channels, the row in the second, sines first, then cosines; Peebles & Xie, arXiv 2212.09748."""
    quarter = width // 4
    omega = POSITION_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    phase = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([phase.sin(), phase.cos()], dim=-1)  # [grid, width / 2]
    columns = waves[None].expand(grid, -1, -1)
    rows = waves[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].to(torch.get_default_dtype())


def _without_bias(layer: Affine) -> Affine:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
