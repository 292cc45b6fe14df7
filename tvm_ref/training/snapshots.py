"""Snapshots of the averages for post-hoc EMA, in the folder ema of a run: ema/step-00001000-0.05.safetensors.

Each file holds one average (model/power_ema.py), named by the step after which it was stored and its relative width.
Its metadata are the settings of the run. Files are complete or absent.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from ..data.safetensors_file import write_safetensors
from . import files
from .checkpoint import CheckpointError
from .config import TrainConfig
from .converted import as_metadata
from .files import write_atomically
from .parallel import World
from .state import State
from .step import NonFiniteError

FOLDER = "ema"
NAME = re.compile(r"step-(\d{8,12})-(\d[\d.]{0,20}(?:e-\d{1,3})?)\.safetensors")


class Snapshot(NamedTuple):
    """A stored average: its file, the step after which it was stored, and the relative width of its profile."""

    path: Path
    step: int
    sigma_rel: float


def snapshots(out: Path) -> list[Snapshot]:
    """Lists the snapshots in the folder of a run, oldest first."""
    found = [(path, NAME.fullmatch(path.name)) for path in (out / FOLDER).glob("step-*.safetensors")]
    return sorted(
        (Snapshot(path, int(name[1]), float(name[2])) for path, name in found if name), key=lambda one: one[1:]
    )


def save_snapshots(state: State, config: TrainConfig, world: World) -> None:
    """Writes a snapshot of every tracked average. Every process calls it.

    Raises on every process: CheckpointError if a file cannot be written, NonFiniteError if a weight is not finite in
    the type of the snapshots.
    """
    kind = getattr(torch, config.ema.precision)
    for sigma_rel, average in state.post_hoc.items():
        weights = {}
        for name, value in average.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if world.first:
                weights[name] = whole.to("cpu", kind)
        path = Path(config.run.out) / FOLDER / f"step-{state.step:08d}-{sigma_rel!r}.safetensors"
        error = _write(path, weights, config) if world.first else None
        if error := next(filter(None, world.gather(error)), None):
            raise error


def set_aside(out: Path, step: int) -> None:
    """Renames the snapshots after `step`, where a run goes back to."""
    for snapshot in snapshots(out):
        if snapshot.step > step:
            files.set_aside(snapshot.path)


def _write(path: Path, weights: dict[str, torch.Tensor], config: TrainConfig) -> Exception | None:
    if bad := next((name for name, x in weights.items() if not x.isfinite().all()), None):
        return NonFiniteError(f"{path.name}: expected finite weights in {config.ema.precision}, got others in {bad}")
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda draft: write_safetensors(weights, draft, as_metadata(config)))
    except OSError as error:
        return CheckpointError(f"snapshot {path} could not be written: {' '.join(str(error).split())}")
    return None
