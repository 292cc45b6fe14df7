"""Sends the metrics of a run to Weights & Biases (run.wandb), with the package wandb, which nothing else imports.

The id of its run is kept in wandb-id.txt in the folder of the run, so that a run that goes on continues there.
"""

import contextlib
import dataclasses
import importlib.util
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .files import write_atomically
from .logger import MetricsError

ID = "wandb-id.txt"
MISSING = "run.wandb: expected the package wandb to be installed: pip install 'flashjvp[wandb]'"


def is_missing() -> bool:
    """Whether the package is not installed."""
    return importlib.util.find_spec("wandb") is None


class WeightsAndBiases:
    """One run there. With WANDB_MODE=offline, all stays in the folder wandb of our run (`wandb sync` sends it)."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises MetricsError if it cannot be reached, or is used without a key."""
        import wandb

        out = Path(config.run.out)
        self._package = wandb
        with _named(wandb):
            self._run: Any = wandb.init(
                project=config.run.wandb, id=_id(out / ID), resume="allow", dir=str(out), name=out.name,
                config=dataclasses.asdict(config),
            )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values of a step. Steps that it has already, since a run went back to a checkpoint, it leaves out."""
        with _named(self._package):
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Sends what is left."""
        with _named(self._package):
            self._run.finish()


@contextlib.contextmanager
def _named(package: Any) -> Iterator[None]:
    """Turns the errors of the package into MetricsError."""
    try:
        yield
    except package.Error as error:
        raise MetricsError(f"run.wandb: {' '.join(str(error).split())}") from error


def _id(path: Path) -> str:
    """The id in a file, which is written if it is not there."""
    if not path.is_file():
        write_atomically(path, lambda draft: draft.write_text(uuid.uuid4().hex[:16]))
    return path.read_text()
