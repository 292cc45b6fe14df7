"""Where a run starts: its newest checkpoint, another one, given weights, or new ones."""

from pathlib import Path

from ..data.fingerprint import Fingerprint, changes, read_fingerprint
from ..model.dit import DiT
from . import checkpoint
from .config import ConfigError, TrainConfig, differences, load_config
from .converted import check_start, load_model
from .parallel import World
from .state import initialised


def check_starts(config: TrainConfig, folder: Path) -> None:
    """Raises CheckpointError if there is nothing where run.resume points, or run.init where that is needed.

    folder: of our checkpoints.
    """
    starts = {"run.resume": config.run.resume}
    if not checkpoint.checkpoints(folder):
        starts["run.init"] = config.run.init
    for name, given in starts.items():
        if given and not Path(given).exists():
            raise checkpoint.CheckpointError(f"{name}: expected an existing path, got {given}")


def check_place(config: TrainConfig) -> None:
    """Raises ConfigError for a folder of the run among the data, whose images would become items."""
    data, out = Path(config.data.path or "."), Path(config.run.out)
    if config.data.path and out.resolve().is_relative_to(data.resolve()):
        raise ConfigError(f"run.out: expected a folder outside of the data set {data}, got {out}")


def start_from(config: TrainConfig, folder: Path, world: World) -> Path | None:
    """The checkpoint that run.resume names, or the newest whole one of the run that it names, or our newest.

    folder: of our checkpoints. Raises CheckpointError.
    """
    resume = Path(config.run.resume)
    if config.run.resume:
        is_checkpoint = (resume / checkpoint.MANIFEST).is_file() or not resume.is_dir()
        return resume if is_checkpoint else checkpoint.newest_whole(resume, world)
    found = checkpoint.checkpoints(folder)
    return found[-1] if found else None


def given_network(config: TrainConfig, world: World) -> DiT:
    """The network of run.init. Raises ConfigError if it is another one than that of the settings, CheckpointError."""
    start = load_model(Path(config.run.init), device=world.device)
    check_start(config, start, config.run.init)
    network = initialised(config, world)
    network.load_state_dict(start.model.state_dict())
    return network


def check_settings(path: Path, config: TrainConfig) -> None:
    """Raises ConfigError if a checkpoint was trained with settings that must not change."""
    if changed := differences(load_config(path / checkpoint.CONFIG), config):
        raise ConfigError(
            f"{path} was trained with other settings ({'; '.join(changed)}): give the same ones to resume, or "
            "another --run.out to start a new run"
        )


def check_data(path: Path, config: TrainConfig, data: Fingerprint) -> None:
    """Raises ConfigError if the data set is not the one that a checkpoint was trained with."""
    file = path / checkpoint.DATA
    if config.run.other_data or not file.is_file():  # checkpoints of earlier versions have none
        return
    if changed := changes(read_fingerprint(file), data):
        raise ConfigError(
            f"{path} was trained with other data ({'; '.join(changed)}): give the same data set, or "
            "--run.other-data to go on with this one"
        )
