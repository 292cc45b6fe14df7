"""What a run will need later, checked before its first step: the decoder of sample grids, folders, and disk space."""

import shutil
import tempfile
from pathlib import Path

from ..data.vae import load_vae
from . import snapshots, tracing, weights_and_biases
from .checkpoint import checkpoints
from .config import ConfigError, TrainConfig
from .parallel import World
from .state import State

FOLDERS = ("samples", "tensorboard", snapshots.FOLDER, tracing.FOLDER)  # of a run, each made when it is needed
MARGIN = 1.02  # of the size of the tensors: headers, settings, the manifest


def check(config: TrainConfig, folder: Path, state: State, world: World) -> None:
    """Raises ConfigError on every process for a VAE that does not load, for a folder in that of the run that cannot be
    written to, or too little room for the next checkpoints.

    folder: holds the checkpoints of the run.
    """
    reason = _reason(config, folder, state, world) if world.first else ""
    if reason := next(filter(None, world.gather(reason)), ""):
        raise ConfigError(reason)


def _reason(config: TrainConfig, folder: Path, state: State, world: World) -> str:
    run = config.run
    if run.wandb and weights_and_biases.is_missing():
        return weights_and_biases.MISSING
    for name in FOLDERS:
        place = Path(run.out) / name
        try:
            if place.exists() or place.is_symlink():
                with tempfile.TemporaryFile(dir=place):
                    pass
        except OSError as error:
            return f"run.out: expected a folder that can be written to, got {error}"
    if run.vae and config.data.latents is None:
        return f"run.vae: expected none for data without latents, got {run.vae}"
    if run.vae:
        try:
            load_vae(Path(run.vae), world.device)
        except (ValueError, OSError, ImportError) as error:
            return f"run.vae: expected the folder of an AutoencoderKL, got {error}"
    saves = -(-(run.steps - state.step) // run.save_every)
    if saves < 1:
        return ""
    here = len(checkpoints(folder))
    # A new checkpoint is complete before an old one is removed.
    more = max(1, min(here + saves, run.keep + 1) - here)
    size, free = int(MARGIN * state.checkpoint_bytes()), shutil.disk_usage(folder).free
    averages = int(MARGIN * _snapshot_bytes(config, state))
    if more * size + averages <= free:
        return ""
    besides = f", and {averages / 2**30:.3g} GiB for all snapshots of ema.sigma_rels" if averages else ""
    return (
        f"run.out: expected {more * size / 2**30:.3g} GiB of free disk space for the next checkpoints "
        f"({size / 2**30:.3g} GiB each, run.keep = {run.keep}){besides}, got {free / 2**30:.3g} GiB at {folder}"
    )


def _snapshot_bytes(config: TrainConfig, state: State) -> int:
    """The size of all snapshots to come."""
    steps, every = config.run.steps, config.ema.every
    count = -(-steps // every) - state.step // every
    item = 2 if config.ema.precision == "float16" else 4
    return count * item * sum(x.numel() for copy in state.post_hoc.values() for x in copy.state_dict().values())
