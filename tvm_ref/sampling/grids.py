"""Writes samples as a grid in one PNG file: images, decoded latents, or the density of 2-D points."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..data.latents import CHANNELS, LatentStatisticsName
from ..data.vae import decode

if TYPE_CHECKING:
    from diffusers.models.autoencoders import AutoencoderKL

LEAST_EDGE = 32  # pixels; smaller images are enlarged by repeating pixels
DENSITY_BINS = 128
DENSITY_RANGE = 3.0
SOFTWARE = "flashjvp"  # says in a PNG file which program made it
GAP = 2
POINTS = ((2, 1, 1), (2, 2, 2))  # shapes of a point, and of a set of four
DECODED_AT_ONCE = 16


def tiles(samples: Tensor, latents: LatentStatisticsName | None = None, vae: AutoencoderKL | None = None) -> Tensor:
    """Turns samples float32 [n, C, H, W] into pictures uint8 [m, 3, h, w]; values outside the range are clipped.

    Images (C = 1 or 3, values in [-1, 1]) give one picture each. Points (C = 2), alone or in fours, give one picture
    in all, their density over [-3, 3]^2. Latents (`latents` names their normalisation) are decoded by `vae`; without
    it, their first three channels are shown as colours, with [-3, 3] as dark to bright. Raises ValueError for other
    channels.
    """
    samples = samples.detach()
    if latents is not None:
        images = samples[:, :3] / 3 if vae is None else decoded(samples, latents, vae)
    elif samples.shape[1:] in POINTS:
        return _density(samples.permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy())
    elif samples.ndim == 4 and samples.shape[1] in (1, 3):
        images = samples
    else:
        raise ValueError(f"expected grey or RGB images, points [n, 2, h, w] or latents, got {list(samples.shape)}")
    images = images.expand(-1, 3, -1, -1)
    enlarge = -(-LEAST_EDGE // min(images.shape[2:]))
    return to_uint8(images).repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3).cpu()


def decoded(latents: Tensor, statistics: LatentStatisticsName, vae: AutoencoderKL) -> Tensor:
    """Decodes normalised latents [n, 4, h, w] to images float32 [n, 3, H, W] on the CPU, a few at a time."""
    if latents.ndim != 4 or latents.shape[1] != CHANNELS:
        raise ValueError(f"latents must be [n, {CHANNELS}, h, w], got {list(latents.shape)}")
    return torch.cat([decode(vae, chunk, statistics).cpu() for chunk in latents.split(DECODED_AT_ONCE)])


def to_uint8(images: Tensor) -> Tensor:
    """Converts images in [-1, 1] to uint8: round(127.5 x + 127.5), clipped. Raises ValueError for NaN and inf."""
    if not images.isfinite().all():
        raise ValueError("expected finite images, got some values that are not")
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _density(points: np.ndarray) -> Tensor:
    if not np.isfinite(points).all():
        raise ValueError("expected finite points, got some values that are not")
    edges = (-DENSITY_RANGE, DENSITY_RANGE)
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=DENSITY_BINS, range=(edges, edges))
    grey = np.sqrt(counts / max(counts.max(), 1.0))[::-1]  # the root keeps thin regions visible; y points up
    return torch.from_numpy((255 * grey).round().astype(np.uint8))[None, None].expand(1, 3, -1, -1)


def is_grid(path: Path) -> bool:
    """Whether a file is one that write_grid made."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get("Software") == SOFTWARE
    except (OSError, ValueError):
        return False


def write_grid(path: Path, pictures: Tensor, columns: int) -> None:
    """Writes pictures uint8 [m, 3, h, w] as one PNG file. The file appears under its name once it is complete.

    Pictures are placed row by row, `columns` in a row; fewer pictures than `columns` give a narrower file.

    Raises ValueError for another dtype or shape or columns < 1, OSError if the file cannot be written.
    """
    if (
        pictures.dtype != torch.uint8
        or pictures.ndim != 4
        or pictures.shape[1] != 3
        or columns < 1
        or not len(pictures)
    ):
        raise ValueError(
            f"expected pictures uint8 [m, 3, h, w] and columns >= 1, got {pictures.dtype} "
            f"{list(pictures.shape)} and columns {columns}"
        )
    count, _, height, width = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        marks = PngInfo()
        marks.add_text("Software", SOFTWARE)
        Image.fromarray(sheet).save(partial, format="PNG", pnginfo=marks)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
