"""Experiment `cycle`: whether a jump leads back to where the network's own velocity came from.

On images, and on data in the shape of latents of 512 pixels, 4 x 64 x 64.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..data.dataset import open_dataset
from ..quality.evaluation import CYCLE_TIMES, cycle_errors
from ..training.config import TrainConfig
from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import by_nfe, look, panels, shared_legend, variants_of
from .latents import ImageLatents
from .measures import cycles, quality, real_quality, sampling_with
from .results import summary
from .short_run import ShortRun, cell
from .training import Measure, Measured, Plan, Trained, cells, with_settings

KINDS = ("clamp", "gap*")
NFES = (1, 2, 4)


def plan(setting: Setting) -> list[Cell]:
    """A variant for clamp and one for gap*, as in the paper."""
    base = bases.images(setting, steps=120)
    nfes, samples = setting.pick(quick=(1,), small=NFES, full=NFES), setting.pick(quick=32, small=500, full=2500)
    of_samples = quality(setting, nfes, samples)

    def measure(trained: Trained) -> Iterator[Measured]:
        yield from of_samples(trained)
        yield from cycles(trained)

    return _on_images(base, setting, measure, {"nfes": nfes, "samples": samples}) + _on_latents(base, setting)


def _on_latents(base: TrainConfig, setting: Setting) -> list[Cell]:
    size, patch = setting.pick(quick=8, small=16, full=64), setting.pick(quick=4, small=4, full=2)
    steps = setting.pick(quick=2, small=60, full=400)
    shape = {"model.image_size": size, "model.channels": 4, "model.patch": patch, "run.batch": 32, "run.steps": steps}

    def dataset() -> ImageLatents:
        return ImageLatents(open_dataset(base.data), size)

    def measure(run: ShortRun) -> Iterator[Measured]:
        found = cycle_errors(run.state.average, dataset(), sampling_with(run.config))
        yield from (Measured(name, value) for name, value in found.items())

    return [
        cell(
            f"{kind}, latents",
            with_settings(base, shape | {"times.kind": kind, "run.seed": seed}),
            dataset,
            setting.world,
            {"latents": size},
            measure,
        )
        for seed in range(setting.pick(quick=1, small=3, full=3))
        for kind in KINDS
    ]


def _on_images(base: TrainConfig, setting: Setting, measure: Measure, measured_with: Mapping[str, Any]) -> list[Cell]:
    return cells(
        Plan(
            base=base,
            variants={kind: {"times.kind": kind} for kind in KINDS},
            seeds=setting.pick(quick=1, small=3, full=3),
            measure=measure,
            measured_with=measured_with,
            floor=lambda seed: real_quality(setting, base.data, measured_with["samples"], seed),
        ),
        setting,
    )


def draw(rows: pd.DataFrame) -> Figure:
    """The cycle error from each time, and the Frechet distance by evaluations."""
    figure, axes = panels(2)
    for number, name in enumerate(variants_of(rows)):
        means = summary(rows[(rows["variant"] == name) & rows["figure"].str.startswith("cycle_error")], "figure")
        axes[0].errorbar(CYCLE_TIMES, means["mean"], yerr=means["std"], label=name, **look(number))
    axes[0].set_xlabel("time t that the cycle goes to")
    axes[0].set_xticks(CYCLE_TIMES)
    axes[0].set_ylabel("cycle error, RMS of a number")
    by_nfe(axes[1], rows[~rows["variant"].str.endswith("latents")], "frechet")
    shared_legend(figure, axes[0])
    return figure


EXPERIMENT = Experiment(
    name="cycle",
    question="Does x0 -> x_t -> x0 end where it began, with times drawn by clamp and by gap*?",
    cells=plan,
    draw=draw,
)
