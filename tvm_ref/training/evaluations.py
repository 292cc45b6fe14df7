"""Evaluations of the EMA weights while a run trains. They change nothing about its steps.

evaluations.csv has a row for each figure; the last row of an evaluation is the number of its samples.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..model.dit import DiT
from ..unsuitable import UnsuitableError
from .config import ConfigError, TrainConfig
from .parallel import World
from .report import AT_ONCE, NFE, SEED, scale_to_sample_with

if TYPE_CHECKING:
    from ..evaluate import EvaluateConfig

FILE, LAST = "evaluations.csv", "samples"
IMAGES = 5000  # of an archive, unless run.evaluate_samples says otherwise
FILES = ("inception", "reference", "features", "features_reference", "reference_images", "vae")


class EvaluationRow(NamedTuple):
    """A figure of an evaluation after a step. nfe: network evaluations for a sample; 0: it does not depend on them."""

    step: int
    nfe: int
    name: str
    value: float


class Evaluations:
    """Evaluates the network of a run every config.run.evaluate_every steps."""

    def __init__(self, config: TrainConfig, world: World, say: Callable[[str], None]) -> None:
        """say: prints a line. Raises ConfigError if a file that is needed is missing or does not fit."""
        self._config, self._world, self._say = config, world, say
        given = [name for name in FILES[:-1] if getattr(config.run, name)]
        if given and config.data.name != "archive":
            raise ConfigError(f"run.{given[0]}: expected nothing for data {config.data.name!r}, got a file")
        if not config.run.evaluate_every:
            return
        from ..evaluate import check_samples, image_judge  # slow to import

        try:
            check_samples(config, config.run.evaluate_samples or None)
        except UnsuitableError as error:
            raise ConfigError(f"run.evaluate_{error}") from error
        if config.data.name != "archive":
            return
        try:
            image_judge(config, self._settings(), world.device)
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError(f"run.evaluate_every: {error}; the options are those of the run: --run.NAME") from error

    def is_due(self, step: int) -> bool:
        """Whether the network is to be evaluated after a step."""
        every = self._config.run.evaluate_every
        return every > 0 and step > 0 and step % every == 0

    def is_missing(self, step: int) -> bool:
        """Whether the run was killed between a step and the end of its evaluation. Every process calls it."""
        path = Path(self._config.run.out) / FILE
        return self._world.gather(self.is_due(step) and not _holds(path, step))[0]

    def evaluate(self, model: DiT, step: int, stop: Callable[[], bool]) -> list[EvaluationRow]:
        """Evaluates a network. Every process calls it.

        stop: asked now and then; if any process says so, the evaluation is given up.

        Returns the rows in the first process. There are none if it was given up, or failed, which is said.
        """
        from ..evaluate import Evaluation, evaluate_together  # slow to import

        rows: list[EvaluationRow] = []

        def done(found: Evaluation) -> None:
            kinds = {**found.by_nfe, 0: {**found.context, LAST: found.samples}}
            rows.extend(EvaluationRow(step, nfe, *x) for nfe, figures in kinds.items() for x in figures.items())

        began = time.monotonic()
        try:
            with random_states_kept(self._world.device):
                scratch = Path(self._config.run.out) / "evaluation"
                evaluate_together(model, self._config, self._settings(), self._world, done, stop=stop, scratch=scratch)
        except (ValueError, OSError, RuntimeError) as error:
            text = " ".join(str(error).split())
            self._say(f"step {step}: the evaluation failed, and training goes on: {text}")
            return []
        if rows:
            first = " | ".join(f"{row.name} {row.value:.4g}" for row in rows if row.nfe == NFE[0])
            self._say(f"step {step}: evaluated in {time.monotonic() - began:.3g} s; {NFE[0]} NFE: {first}")
        return rows

    def _settings(self) -> "EvaluateConfig":
        from ..evaluate import EvaluateConfig  # slow to import

        run, archive = self._config.run, self._config.data.name == "archive"
        files: dict[str, Any] = {name: Path(getattr(run, name)) for name in FILES if archive and getattr(run, name)}
        return EvaluateConfig(
            checkpoint=Path(run.out),
            nfe=NFE,
            w=scale_to_sample_with(self._config.loss),
            samples=run.evaluate_samples or (IMAGES if archive else None),
            seed=SEED,
            batch=AT_ONCE,
            device=self._world.device.type,
            **files,
        )


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Leaves the global random states of Python, NumPy and PyTorch, also on `device`, as they were."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def kept_until(path: Path, step: int) -> int:
    """The last step whose rows in the file are kept where a run goes on after `step`."""
    return step if _holds(path, step) else step - 1


def _holds(path: Path, step: int) -> bool:
    """Whether the file holds the whole evaluation of a step."""
    if not path.is_file():
        return False
    start = f"{step},0,{LAST},"
    return any(
        row.startswith(start) and row.endswith("\n")
        for row in path.read_text(errors="replace").splitlines(keepends=True)
    )
