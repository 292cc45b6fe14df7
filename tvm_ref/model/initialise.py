"""Initial weights of the diffusion transformer, and its fixed position embedding (Zhou et al., arXiv 2511.19797)."""

from typing import TypeVar

import torch
from torch import Tensor, nn

STD = 0.02
POSITION_PERIOD = 10000.0

Affine = TypeVar("Affine", nn.Linear, nn.Conv2d)


def spectral(layer: Affine) -> Affine:
    """Gives the layer a weight of spectral norm 1 and zero biases.

    The weight, as a matrix [out, rest], is Xavier-normal, divided by its largest singular value.
    """
    with torch.no_grad():
        matrix = layer.weight.flatten(1)
        nn.init.xavier_normal_(matrix)
        layer.weight.copy_((matrix / torch.linalg.matrix_norm(matrix, ord=2)).view_as(layer.weight))
    return _with_zero_bias(layer)


def normal(layer: nn.Linear) -> nn.Linear:
    """Gives the layer weights N(0, 0.02^2) and zero biases."""
    nn.init.normal_(layer.weight, std=STD)
    return _with_zero_bias(layer)


def zero(layer: nn.Linear) -> nn.Linear:
    """Gives the layer zero weights and biases."""
    nn.init.zeros_(layer.weight)
    return _with_zero_bias(layer)


def position_embedding(grid: int, width: int) -> Tensor:
    """Sinusoidal position embedding [1, grid * grid, width] in torch's default dtype (Peebles & Xie, arXiv 2212.09748).

    Tokens are ordered row by row. The first half of the channels encodes the column, the second half the row; each half
    has its sines first, then its cosines.
    """
    quarter = width // 4
    omega = POSITION_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    phase = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    waves = torch.cat([phase.sin(), phase.cos()], dim=-1)  # [grid, width / 2]
    columns = waves[None].expand(grid, -1, -1)
    rows = waves[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].to(torch.get_default_dtype())


def _with_zero_bias(layer: Affine) -> Affine:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
