"""Cells that train a network by the trainer of tvm_ref.train, and measure it at some of its steps."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from flashjvp_commands.ending import Stopped

from ..data.fingerprint import digest_of_files
from ..model.dit import DiT
from ..training.config import TrainConfig
from ..training.parallel import World
from ..training.step import NonFiniteError
from ..training.trainer import Trainer
from .cells import Cell, Setting
from .results import REAL, Row

NAN = float("nan")


class Measured(NamedTuple):
    """A figure of a trained network. step: None is that of the evaluation."""

    figure: str
    value: float
    nfe: int = 0
    w: float = NAN
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network after some steps: its EMA weights, its settings, and the folder of its run."""

    model: DiT
    config: TrainConfig
    folder: Path
    step: int
    world: World


Measure = Callable[[Trained], Iterable[Measured]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Variants of a training run.

    base: the settings that all share. variants: what is different in each, by names such as "loss.detach". seeds: how
    many runs of each. at: the parts of a run after which it is measured, such as (0.5, 1). measured_with: settings of
    `measure`, as JSON. floor: what real data get for a seed; None: there is no such thing. seconds_per_step: of each
    variant, where runs are as long in time, not in steps: then run.steps is that of the first variant.
    """

    base: TrainConfig
    variants: Mapping[str, Mapping[str, Any]]
    seeds: int
    measure: Measure
    measured_with: Mapping[str, Any]
    at: tuple[float, ...] = (1.0,)
    floor: Callable[[int], Iterable[Measured]] | None = None
    seconds_per_step: Mapping[str, float] | None = None


def cells(plan: Plan, setting: Setting) -> list[Cell]:
    """A cell for each variant and seed, seed by seed, after those of the real data."""
    if setting.imagenet_classifier is not None:
        digest = {"imagenet_classifier": digest_of_files(setting.imagenet_classifier)}
        plan = dataclasses.replace(plan, measured_with={**plan.measured_with, **digest})
    found = []
    for seed in range(plan.seeds):
        if plan.floor is not None:
            found.append(_floor(plan, seed))
        found += [_cell(plan, name, seed, setting.world) for name in plan.variants]
    return found


def with_settings(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """`config` with some settings changed, named as on the command line: {"loss.detach": True}."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field] = value
    changed = {group: dataclasses.replace(getattr(config, group), **fields) for group, fields in groups.items()}
    return dataclasses.replace(config, **changed)


def steps_in_equal_time(steps: int, costs: Mapping[str, float]) -> dict[str, int]:
    """How many steps each variant makes in the time that `steps` take the first one, by its seconds for a step."""
    first = next(iter(costs.values()))
    return {name: max(1, round(steps * first / cost)) for name, cost in costs.items()}


def _cell(plan: Plan, name: str, seed: int, world: World) -> Cell:
    config = with_settings(plan.base, {"run.seed": seed, **plan.variants[name]})
    cost = NAN
    if plan.seconds_per_step is not None:
        cost = plan.seconds_per_step[name]
        steps = steps_in_equal_time(plan.base.run.steps, plan.seconds_per_step)[name]
        config = with_settings(config, {"run.steps": steps})
    settings = settings_of(config) | {"at": list(plan.at), **plan.measured_with}

    def work(folder: Path) -> list[Row]:
        rows: list[Row] = []
        for part in plan.at:
            step = max(1, round(part * config.run.steps))
            try:
                trained = train_until(step, config, folder, world)
            except NonFiniteError as error:
                (folder / "not-finite.txt").write_text(f"{error}\n")
                return [*rows, diverged(name, config, step)]
            for found in plan.measure(trained):
                at = step if found.step is None else found.step
                rows.append(Row(name, seed, at, at * cost, found.nfe, found.w, found.figure, found.value))
        return rows

    return Cell(variant=name, seed=seed, settings=settings, work=work)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What the results of a run depend on."""
    settings = {f"{group}": values for group, values in dataclasses.asdict(config).items() if group != "run"}
    run = dataclasses.asdict(config.run)
    return settings | {f"run.{key}": run[key] for key in ("steps", "batch", "precision", "seed")}


def diverged(variant: str, config: TrainConfig, step: int | None = None) -> Row:
    """The row of a run whose loss or gradient was not finite, until this step."""
    return Row(variant, config.run.seed, step or config.run.steps, NAN, 0, NAN, "diverged", 1.0)


def _floor(plan: Plan, seed: int) -> Cell:
    floor = plan.floor
    assert floor is not None

    def work(folder: Path) -> list[Row]:
        return [Row(REAL, seed, 0, NAN, x.nfe, x.w, x.figure, x.value) for x in floor(seed)]

    return Cell(variant=REAL, seed=seed, settings=dict(plan.measured_with), work=work)


def train_until(step: int, config: TrainConfig, folder: Path, world: World) -> Trained:
    """Trains, or goes on to train, the run in `folder` until `step`. Raises Stopped where a signal stopped it."""
    config = with_settings(
        config,
        {
            "run.steps": step, "run.out": str(folder / "run"), "run.evaluate": False, "run.keep": 1,
            "run.sample_every": step, "run.save_every": max(1, min(step, 1000)),
        },
    )  # fmt: skip
    if config.run.compile and not (folder / "run").exists():
        torch.compiler.reset()  # variants share the function that is compiled, which has few versions at a time
    with (folder / "log.txt").open("a") as log:
        trainer = Trainer(config, world, Console(file=log, width=200))
        if not trainer.run():
            raise Stopped(trainer.signal)
    return Trained(model=trainer.state.average, config=config, folder=folder / "run", step=step, world=world)
