"""Draws a grid of samples: `python -m tvm_ref.sample CHECKPOINT --nfe 1 --w 2 --classes 0,1,2 --out grid.png`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from flashjvp_commands import ending, outputs
from flashjvp_commands.entry import program

from .arguments import Numbers, check_common, check_guidance, parsed
from .data.vae import load_vae
from .model.dit import DiT
from .sampling.generate import generate, guidance_scale
from .sampling.grids import is_grid, tiles, write_grid
from .training.checkpoint import CheckpointError, load_model
from .training.config import TrainConfig

DEFAULT_CLASSES = 10  # rows, if the network has more classes
DEFAULT_POINTS = 8192
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw samples from a checkpoint and write them as one PNG file.

    The file shows a row for each class; of 2-D points, their density.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, or the folder of a run (its newest checkpoint)."""
    nfe: int = 1
    """NFE: number of function evaluations of the network for each sample."""
    w: float | None = None
    """Guidance scale; None: that of training."""
    classes: Numbers | None = None
    """Class of each row, such as 0,1,2; None: the first ten."""
    per_class: int | None = None
    """Samples in a row; None: 8, or 8192 points."""
    seed: int = 0
    """Seed of the noise: the same seed gives the same samples."""
    out: Path = Path("samples.png")
    """The PNG file to write, or a folder for samples.png; folders are made, and only grids are replaced."""
    weights: Literal["ema", "raw"] = "ema"
    """EMA weights (ema), or those of the last step (raw)."""
    vae: Path | None = None
    """Folder of a diffusers AutoencoderKL that decodes latents; None: latents are shown as colours."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device that the network runs on: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        check_common(device=self.device, seed=self.seed, per_class=self.per_class)
        check_guidance(self.w)
        outputs.checked_name(self.out, (".png",))


def labels_of_rows(num_classes: int, classes: tuple[int, ...] | None, per_class: int) -> Tensor:
    """Returns the labels int64 [rows * per_class] of a grid. Raises ValueError for classes that do not exist."""
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class}")
    if num_classes == 0:
        if classes is not None:
            raise ValueError(f"classes: the network was trained without classes, got {classes}")
        classes = (0,)
    if classes is None:
        classes = tuple(range(min(num_classes, DEFAULT_CLASSES)))
    if num_classes and not all(0 <= label < num_classes for label in classes):
        raise ValueError(f"classes: expected numbers from 0 to {num_classes - 1}, got {classes}")
    return torch.tensor(classes, dtype=torch.int64).repeat_interleave(per_class)


def draw_grid(model: DiT, config: TrainConfig, settings: SampleConfig) -> None:
    """Draws and writes the grid. Raises ValueError for settings that do not match the network."""
    points = model.config.image_size == 1
    per_class = settings.per_class if settings.per_class is not None else (DEFAULT_POINTS if points else 8)
    labels = labels_of_rows(model.config.num_classes, settings.classes, per_class)
    w = guidance_scale(config.loss, model.config.guidance, settings.w)
    latents = config.data.latents
    if settings.vae is not None and latents is None:
        raise ValueError("vae: the network was not trained on latents, so there is nothing to decode")
    vae = load_vae(settings.vae, torch.device(settings.device)) if settings.vae is not None else None
    batches = generate(
        model,
        labels,
        w=w,
        steps=settings.nfe,
        scaled=config.loss.scaled,
        seed=settings.seed,
        batch=DEFAULT_POINTS if points else BATCH,
    )
    pictures = tiles(torch.cat([batch.cpu() for batch in batches]), latents, vae)
    write_grid(settings.out, pictures, columns=1 if points else per_class)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        settings = parsed(lambda: tyro.cli(SampleConfig, prog=program("tvm_ref.sample"), args=arguments))
        out = outputs.prepared(settings.out, "samples.png", (".png",), is_grid)
        settings = replace(settings, out=out)
        loaded = load_model(settings.checkpoint, device=torch.device(settings.device), weights=settings.weights)
        draw_grid(loaded.model, loaded.config, settings)
    except (OSError, ValueError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"samples written to {settings.out}")


if __name__ == "__main__":
    sys.exit(ending.run(main))
