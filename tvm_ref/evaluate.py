"""Measures the quality of a checkpoint's samples, such as FID: `python -m tvm_ref.evaluate CHECKPOINT --nfe 1,2,4`."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from flashjvp_commands import ending, outputs
from flashjvp_commands.entry import program

from .arguments import Numbers, check_common, check_guidance, check_out, parsed
from .model.dit import DiT
from .quality.evaluation import Evaluation, Sampling, evaluate_digits, evaluate_images, evaluate_toy
from .sampling.generate import guidance_scale, untrained
from .training.checkpoint import CheckpointError
from .training.config import TrainConfig
from .training.converted import load_model


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare the samples of a checkpoint with its data, for each number of function evaluations (NFE).

    2-D toys: exact 2-Wasserstein distance to fresh points, with that between two fresh sets for reference. Digits:
    class accuracy, and squared Frechet distance on pixels in [0, 1]. Archives: FID, and, given reference images,
    precision and recall; these need the Inception weights. All: cycle error x0 -> x_t -> x0.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, the folder of a run (its newest checkpoint), or converted weights (.safetensors)."""
    nfe: Numbers = (1, 2, 4)
    """NFE: numbers of function evaluations of the network for each sample, such as 1,2,4."""
    w: float | None = None
    """Guidance scale; None: that of training."""
    samples: int | None = None
    """Number of samples; None: 2048 points, 1797 digits (as many as there are real ones) or 50000 images."""
    seed: int = 0
    """Seed of noise and labels: the same seed gives the same results."""
    batch: int = 256
    """Batch size of sampling."""
    weights: Literal["ema", "raw"] = "ema"
    """EMA weights (ema), or those of the last step (raw)."""
    inception: Path | None = None
    """Local file inception-2015-12-05.pt (archives only)."""
    reference: Path | None = None
    """Reference statistics for FID, .npz or plain .pkl with mu and sigma (archives only)."""
    reference_images: Path | None = None
    """Zip file or folder of real RGB images, for precision, recall, and FID without --reference (archives only)."""
    vae: Path | None = None
    """Folder of the diffusers AutoencoderKL that decodes latents (archives of latents only)."""
    data: str | None = None
    """Path of the training archive; None: the path used in training (archives only)."""
    out: Path | None = None
    """JSON file for the results, or a folder for quality.json; folders are made, and only such files replaced."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device that the networks run on: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        check_common(device=self.device, seed=self.seed, batch=self.batch)
        check_guidance(self.w)
        if self.out is not None:
            check_out(self.out, ".json")


def evaluate(model: DiT, config: TrainConfig, settings: EvaluateConfig) -> Evaluation:
    """Evaluates `model`, trained with `config`. Raises ValueError for settings that do not match the network."""
    w = guidance_scale(config.loss, model.config.guidance, settings.w)
    if warning := untrained(config.loss, w):
        print(warning, file=sys.stderr)
    sampling = Sampling(w=w, scaled=config.loss.scaled, seed=settings.seed, batch=settings.batch)
    if settings.samples is not None and settings.samples < 2:
        raise ValueError(f"samples: expected at least 2, got {settings.samples}")
    if config.data.name == "archive":
        return evaluate_images(
            model,
            dataclasses.replace(config.data, path=settings.data or config.data.path),
            settings.nfe,
            settings.samples or 50_000,
            sampling,
            inception=settings.inception,
            reference=settings.reference,
            reference_images=settings.reference_images,
            vae=settings.vae,
        )
    archive_only = ("inception", "reference", "reference_images", "vae", "data")
    if given := [name for name in archive_only if getattr(settings, name) is not None]:
        raise ValueError(f"{', '.join(given)}: only for networks of archives, and this one is of {config.data.name}")
    if config.data.name == "digits":
        return evaluate_digits(model, settings.nfe, settings.samples or 1797, sampling)
    return evaluate_toy(model, config.data.name, settings.nfe, settings.samples or 2048, sampling)


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Prints the results as a table, with a row for each NFE."""
    names = list(evaluation.by_nfe[next(iter(evaluation.by_nfe))])
    table = Table(title=f"{evaluation.samples} samples")
    for name in ("NFE", *names):
        table.add_column(name, justify="right")
    for nfe, figures in evaluation.by_nfe.items():
        table.add_row(str(nfe), *(f"{figures[name]:.4g}" for name in names))
    console.print(table)
    for name, value in evaluation.context.items():
        console.print(f"{name}: {value:.4g}")


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Writes the results as JSON. The file appears under its name once it is complete."""
    content = {"samples": evaluation.samples, "nfe": evaluation.by_nfe, "context": evaluation.context}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        settings = parsed(lambda: tyro.cli(EvaluateConfig, prog=program("tvm_ref.evaluate"), args=arguments))
        ours = outputs.starts_with(b'{\n  "samples": ')
        out = None if settings.out is None else outputs.prepared(settings.out, "quality.json", (".json",), ours)
        loaded = load_model(settings.checkpoint, device=torch.device(settings.device), weights=settings.weights)
        evaluation = evaluate(loaded.model, loaded.config, settings)
        print_table(evaluation, Console())
        if out is not None:
            write_json(evaluation, out)
    except (OSError, ValueError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    sys.exit(ending.run(main))
