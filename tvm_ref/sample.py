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

from .arguments import Numbers, check_common, check_guidance, check_out, parsed
from .data.vae import load_vae
from .model.dit import DiT
from .sampling.generate import generate, guidance_scale, untrained
from .sampling.grids import decoded, is_grid, tiles, to_uint8, write_grid
from .sampling.image_files import write_images
from .sampling.sampler import steps_of
from .training.checkpoint import CheckpointError
from .training.config import TrainConfig
from .training.converted import load_model
from .unsuitable import UnsuitableError

DEFAULT_CLASSES = 10  # rows, if the network has more classes
DEFAULT_POINTS = 8192
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw samples from a checkpoint and write them as one PNG file.

    The file shows a row for each class; of 2-D points, their density.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, the folder of a run (its newest checkpoint), or converted weights (.safetensors)."""
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
    """A PNG file for a grid; a zip file or a folder for every image by itself. Only grids are replaced."""
    weights: Literal["ema", "raw"] = "ema"
    """EMA weights (ema), or those of the last step (raw)."""
    vae: Path | None = None
    """Folder of a diffusers AutoencoderKL that decodes latents; None: latents are shown as colours."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device that the network runs on: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        check_common(device=self.device, seed=self.seed, per_class=self.per_class, nfe=self.nfe)
        check_guidance(self.w)
        check_out(self.out, ".png", ".zip")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: expected each number once, got {','.join(map(str, self.classes))}")


def labels_of_rows(num_classes: int, classes: tuple[int, ...] | None, per_class: int) -> Tensor:
    """Returns the labels int64 [rows * per_class] of a grid. Raises UnsuitableError for classes that do not exist."""
    if per_class < 1:
        raise UnsuitableError(f"per_class: expected at least 1, got {per_class}")
    if num_classes == 0:
        if classes is not None:
            raise UnsuitableError(f"classes: the network was trained without classes, got {classes}")
        classes = (0,)
    if classes is None:
        classes = tuple(range(min(num_classes, DEFAULT_CLASSES)))
    if num_classes and not all(0 <= label < num_classes for label in classes):
        raise UnsuitableError(f"classes: expected numbers from 0 to {num_classes - 1}, got {classes}")
    return torch.tensor(classes, dtype=torch.int64).repeat_interleave(per_class)


def draw_grid(model: DiT, config: TrainConfig, settings: SampleConfig) -> None:
    """Draws and writes the samples. Raises UnsuitableError for settings that do not match the network."""
    as_grid = settings.out.suffix == ".png"
    points = model.config.channels == 2
    per_class = settings.per_class if settings.per_class is not None else (DEFAULT_POINTS if points else 8)
    labels = labels_of_rows(model.config.num_classes, settings.classes, per_class)
    w = guidance_scale(config.loss, model.config.guidance, settings.w)
    latents = config.data.latents
    if settings.vae is not None and latents is None:
        raise UnsuitableError("vae: the network was not trained on latents, so there is nothing to decode")
    vae = load_vae(settings.vae, torch.device(settings.device)) if settings.vae is not None else None
    if not as_grid and (points or (latents is not None and vae is None)):
        raise UnsuitableError("out: expected a file .png for points, and for latents without --vae")
    if warning := untrained(config.loss, w):
        print(warning, file=sys.stderr)
    batches = generate(
        model,
        labels,
        w=w,
        steps=settings.nfe,
        scaled=config.loss.scaled,
        seed=settings.seed,
        batch=DEFAULT_POINTS if points else BATCH,
        kind=steps_of(config.loss.objective),
    )
    samples = torch.cat([batch.cpu() for batch in batches])
    if not as_grid:
        images = samples if latents is None or vae is None else decoded(samples, latents, vae)
        pictures = to_uint8(images.expand(-1, 3, -1, -1))
        write_images(settings.out, pictures, labels if model.config.num_classes else None)
        return
    pictures = tiles(samples, latents, vae)
    write_grid(settings.out, pictures, columns=1 if points else per_class)


def checked_out(out: Path) -> Path:
    """Makes the folders of `--out`. Raises OutputError for what exists and is neither a grid nor an empty folder."""
    if out.suffix == ".png":
        return outputs.prepared(out, "samples.png", (".png",), is_grid)
    return outputs.new(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        settings = parsed(SampleConfig, "tvm_ref.sample", arguments)
        settings = replace(settings, out=checked_out(settings.out))
        loaded = load_model(settings.checkpoint, device=torch.device(settings.device), weights=settings.weights)
        draw_grid(loaded.model, loaded.config, settings)
    except outputs.OutputError as error:
        raise ending.unusable(f"out: {error}") from error
    except UnsuitableError as error:
        raise ending.unusable(error) from error
    except (OSError, ValueError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"samples written to {settings.out}")


if __name__ == "__main__":
    sys.exit(ending.run(main))
