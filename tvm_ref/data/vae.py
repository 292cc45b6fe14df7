"""The VAE that encodes images as latents and decodes them: a diffusers AutoencoderKL from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .latents import CHANNELS, LatentStatisticsName, denormalise
from .safetensors_header import read_header
from .untrusted import read_settings

if TYPE_CHECKING:  # diffusers takes seconds to import, and only latent models need it
    from diffusers.models.autoencoders import AutoencoderKL

MOST_CHANNELS = 4096


def load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """Loads the VAE saved in `folder` (config.json, diffusion_pytorch_model.safetensors) in float32, for inference.

    Nothing is downloaded, and no pickle is read. Raises FileNotFoundError that says what to download if a file is
    missing. Raises ValueError for damaged files, for missing or unexpected weights, and for a VAE that does not encode
    RGB images in four latent channels.
    """
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}: expected the folder of a diffusers AutoencoderKL with safetensors; that "
                "of the published latents comes with `hf download stabilityai/sd-vae-ft-ema --local-dir FOLDER`"
            )
    from diffusers.models.autoencoders import AutoencoderKL

    try:
        read_header(folder / "diffusion_pytorch_model.safetensors")
        _check_sizes(read_settings(folder / "config.json"))
        vae, loading = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: its files do not make an AutoencoderKL: {error}") from error
    # diffusers leaves a missing weight at its random initial value.
    for what in ("missing_keys", "unexpected_keys"):
        if loading[what]:
            raise ValueError(f"{folder}: {what.replace('_keys', '')} weights, first {sorted(loading[what])[0]}")
    channels = (vae.config["in_channels"], vae.config["out_channels"], vae.config["latent_channels"])
    if channels != (3, 3, CHANNELS):
        raise ValueError(
            f"{folder}: expected an autoencoder with (in, out, latent) channels (3, 3, {CHANNELS}), got {channels}"
        )
    return vae.requires_grad_(False).eval().to(device)


def _check_sizes(settings: object) -> None:
    """Raises ValueError for numbers of channels or layers that would make diffusers allocate without end."""
    waiting, channels = [settings], []
    while waiting:
        match waiting.pop():
            case dict(values):
                waiting += values.values()
            case list(values):
                waiting += values
            case int(number):
                channels.append(number)
    if not isinstance(settings, dict) or any(abs(number) > MOST_CHANNELS for number in channels):
        raise ValueError(f"expected a config.json with numbers of at most {MOST_CHANNELS}")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encodes images uint8 [n, 3, H, W] as float32 [n, 8, h, w]: the posterior's mean, then its standard deviation.

    h = H / 8 for the published VAE. Without the factor 0.18215. Raises ValueError for other images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}")
    posterior = vae.encode(images.to(vae.device, torch.float32) / 127.5 - 1).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, statistics: LatentStatisticsName) -> Tensor:
    """Decodes normalised latents float32 [n, 4, h, w] to images float32 [n, 3, H, W], about [-1, 1], on vae's device.

    statistics: the normalisation to undo first.
    """
    return vae.decode(denormalise(latents.to(vae.device, torch.float32), statistics)).sample
