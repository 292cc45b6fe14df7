"""Normalisation of the latents of the Stable Diffusion VAE, with the published means and standard deviations."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LatentStatisticsName = Literal["imagenet256", "imagenet512"]
CHANNELS = 4


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each channel of raw latents (without the factor 0.18215)."""

    mean: tuple[float, float, float, float]
    deviation: tuple[float, float, float, float]


# sd-vae-ft-ema on ImageNet at 256 and 512 pixels (Zhou et al., arXiv 2511.19797, and its published settings).
LATENT_STATISTICS: dict[LatentStatisticsName, LatentStatistics] = {
    "imagenet256": LatentStatistics(
        (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    ),
    "imagenet512": LatentStatistics((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
}


def normalise(latents: Tensor, name: LatentStatisticsName) -> Tensor:
    """Raw latents [n, 4, h, w] to what the network models: (z - mean) / deviation for each channel, same dtype."""
    mean, deviation = _columns(latents, name)
    return (latents - mean) / deviation


def denormalise(latents: Tensor, name: LatentStatisticsName) -> Tensor:
    """The inverse of `normalise`, z * deviation + mean: network output [n, 4, h, w] to decoder input, same dtype."""
    mean, deviation = _columns(latents, name)
    return latents * deviation + mean


def _columns(latents: Tensor, name: LatentStatisticsName) -> tuple[Tensor, Tensor]:
    if latents.ndim != 4 or latents.shape[1] != CHANNELS:
        raise ValueError(f"latents must be [n, {CHANNELS}, h, w], got {list(latents.shape)}")
    statistics = LATENT_STATISTICS[name]
    mean, deviation = (
        torch.tensor(values, dtype=latents.dtype, device=latents.device)[:, None, None]
        for values in (statistics.mean, statistics.deviation)
    )
    return mean, deviation
