"""Cells that train without a folder: runs too short, or networks too large, to be worth checkpoints."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.dataset import Dataset
from ..objective.loss import Batch
from ..training.batches import Batches
from ..training.config import TrainConfig
from ..training.observe import NormRow, Observations
from ..training.parallel import World
from ..training.state import State
from ..training.step import NonFiniteError, queue_gradient
from .cells import Cell
from .results import Row
from .training import NAN, Measured, diverged, settings_of


class ShortRun(NamedTuple):
    """A network after all steps of its settings, and the rows of its norms."""

    state: State
    config: TrainConfig
    norms: list[NormRow]


def train(config: TrainConfig, dataset: Dataset, world: World) -> ShortRun:
    """Makes the steps. Raises NonFiniteError where a loss or gradient is not finite."""
    if config.run.compile:
        torch.compiler.reset()  # as training.train_until
    state = State(config, world)
    observations = Observations(config, state.network, world)
    norms: list[NormRow] = []
    with contextlib.closing(Batches(config, dataset, world).steps(0)) as steps:
        for number in range(1, config.run.steps + 1):
            observations.begin(number)
            queued = queue_gradient(
                state.objective,
                state.target,
                [Batch(*(x.to(world.device, non_blocking=True) for x in batch)) for batch in steps.take()],
                world,
                clip=config.optim.clip,
                observer=observations,
                captured=state.captured,
            )
            state.advance(queued.finite)
            queued.outcome()
            norms += observations.rows(number)[0]
    return ShortRun(state, config, norms)


def cell(
    variant: str,
    config: TrainConfig,
    dataset: Callable[[], Dataset],
    world: World,
    measured_with: Mapping[str, Any],
    measure: Callable[[ShortRun], Iterable[Measured]],
) -> Cell:
    """A cell for one run, of the seed that its settings have."""

    def work(_: Path) -> list[Row]:
        try:
            run = train(config, dataset(), world)
        except NonFiniteError:
            return [diverged(variant, config)]
        steps, seed = config.run.steps, config.run.seed
        return [
            Row(variant, seed, steps if x.step is None else x.step, NAN, x.nfe, x.w, x.figure, x.value)
            for x in measure(run)
        ]

    settings = settings_of(config) | dict(measured_with)
    return Cell(variant=variant, seed=config.run.seed, settings=settings, work=work)
