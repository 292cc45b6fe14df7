"""Input embeddings of the diffusion transformer: image patches, scalars (times and guidance) and class labels."""

import math

import torch
from torch import Tensor, nn

from . import dual
from .config import DiTConfig
from .dual import Dual, Maybe
from .initialise import STD, normal, spectral

FREQUENCIES = 128  # each gives a cosine and a sine
MAX_PERIOD = 10000.0


class PatchEmbedder(nn.Module):
    """Embeds the patches of x [B, C, H, W] by one linear layer: tokens [B, (H / patch) (W / patch), width], row by row.

    The weight has the shape of a strided convolution, as in the published networks.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = spectral(nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch))

    def forward(self, x: Dual) -> Dual:
        """Returns the tokens, with a tangent if x has one."""
        return dual.linear(x.map(self._patches), self.proj.weight.flatten(1), self.proj.bias)

    def _patches(self, x: Tensor) -> Tensor:
        p = self.patch
        rows = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B, C, H / p, p, W / p, p]
        return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class ScalarEmbedder(nn.Module):
    """Embeds scalars [B], such as times, by an MLP of their sinusoids: [B, width]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        start = spectral if config.spectral_time_mlp else normal
        first, second = nn.Linear(2 * FREQUENCIES, config.width), nn.Linear(config.width, config.width)
        self.mlp = nn.Sequential(start(first), nn.SiLU(), start(second))

    def forward(self, scalar: Tensor, tangent: Maybe = None) -> Dual:
        """Returns the embedding, with a tangent if the scalar has one."""
        first, _, second = self.mlp
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        exponents = torch.arange(FREQUENCIES, dtype=torch.float64, device=scalar.device) / FREQUENCIES
        waves = dual.sinusoids(scalar, tangent, torch.exp(-math.log(MAX_PERIOD) * exponents))
        waves = waves.map(lambda part: part.to(first.weight.dtype))
        return dual.linear(dual.silu(dual.linear(waves, first.weight, first.bias)), second.weight, second.bias)


class LabelEmbedder(nn.Module):
    """A learned vector for each label. Row num_classes stands for "no class"."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.width)
        nn.init.normal_(self.embedding_table.weight, std=STD)

    def forward(self, labels: Tensor) -> Dual:
        """Returns the vectors [B, width] of labels [B]. They have no tangent."""
        return Dual(self.embedding_table(labels))
