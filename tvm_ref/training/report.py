"""Samples of a run: grids of images while it trains, and an evaluation at its end."""

from pathlib import Path

import torch
from rich.console import Console

from ..data.vae import load_vae
from ..model.dit import DiT, DiTConfig
from ..objective.loss import LossConfig
from ..sampling.generate import generate
from ..sampling.grids import tiles, write_grid
from ..sampling.sampler import steps_of
from .checkpoint import load_model
from .config import TrainConfig

SUMMARY = "summary.json"
NFE = (1, 2, 4)
POINTS = 2048
PER_CLASS = 10
MOST_IMAGES = 100
SEED = 0
AT_ONCE = 256  # images in a batch


def has_grids(config: TrainConfig, step: int) -> bool:
    """Whether the sample grids of a step are in the folder of the run."""
    return all(_grid(config, step, nfe).is_file() for nfe in NFE)


def _grid(config: TrainConfig, step: int, nfe: int) -> Path:
    return Path(config.run.out) / "samples" / f"step-{step:08d}-nfe-{nfe}.png"


def sample_grids(model: DiT, config: TrainConfig, step: int, *, write: bool) -> None:
    """Writes sample grids for 1, 2 and 4 NFE into the folder of the run: samples/step-00000100-nfe-1.png and so on.

    Noise and labels are the same at every call. If the weights are sharded, every process must call it, one of them
    with write = True.
    """
    vae = load_vae(Path(config.run.vae), next(model.parameters()).device) if config.run.vae and write else None
    labels = _labels(config.model)
    at_once = POINTS if config.model.channels == 2 else AT_ONCE
    w = scale_to_sample_with(config.loss)
    for nfe in NFE:
        batches = generate(
            model,
            labels,
            w=w,
            steps=nfe,
            scaled=config.loss.scaled,
            seed=SEED,
            batch=at_once,
            kind=steps_of(config.loss.objective),
        )
        samples = torch.cat(list(batches))
        if write:
            path = _grid(config, step, nfe)
            path.parent.mkdir(exist_ok=True)
            write_grid(path, tiles(samples, config.data.latents, vae), columns=PER_CLASS)


def scale_to_sample_with(config: LossConfig) -> float:
    """The guidance scale to sample with: that of training, or the largest one if it is random."""
    return config.w if config.w_random is None else config.w_random[1]


def _labels(config: DiTConfig) -> torch.Tensor:
    """Labels of a grid whose rows show one class each, spread evenly if there are many. All zero without classes."""
    if config.num_classes == 0:
        return torch.zeros(POINTS if config.channels == 2 else MOST_IMAGES, dtype=torch.int64)
    rows = min(config.num_classes, MOST_IMAGES // PER_CLASS)
    return (torch.arange(rows) * config.num_classes // rows).repeat_interleave(PER_CLASS)


def final_figures(path: Path, config: TrainConfig, device: torch.device, console: Console) -> None:
    """Evaluates samples of a checkpoint, prints a table and writes summary.json into the folder of the run."""
    from ..evaluate import EvaluateConfig, evaluate, print_table, write_json  # slow to import

    settings = EvaluateConfig(checkpoint=path, w=scale_to_sample_with(config.loss))
    figures = evaluate(load_model(path, device=device).model, config, settings)
    print_table(figures, console)
    write_json(figures, Path(config.run.out) / SUMMARY)
