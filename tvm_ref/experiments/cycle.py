"""Experiment `cycle`: whether a jump leads back to where the network's own velocity came from."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.figure import Figure

from ..quality.evaluation import CYCLE_TIMES
from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import by_nfe, look, panels, shared_legend, variants_of
from .measures import cycles, quality, real_quality
from .results import summary
from .training import Measured, Plan, Trained, cells

KINDS = ("clamp", "gap*")
NFES = (1, 2, 4)


def plan(setting: Setting) -> list[Cell]:
    """A variant for clamp and one for gap*, as in the paper."""
    base = bases.images(setting, steps=120)
    nfes, samples = setting.pick(quick=(1,), small=NFES, full=NFES), setting.pick(quick=32, small=500, full=10_000)
    of_samples = quality(nfes, samples)

    def measure(trained: Trained) -> Iterator[Measured]:
        yield from of_samples(trained)
        yield from cycles(trained)

    return cells(
        Plan(
            base=base,
            variants={kind: {"times.kind": kind} for kind in KINDS},
            seeds=setting.pick(quick=1, small=3, full=3),
            measure=measure,
            measured_with={"nfes": nfes, "samples": samples},
            floor=lambda seed: real_quality(base.data, samples, seed, setting.world),
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
    axes[0].set_ylabel("cycle error, RMS of a pixel")
    by_nfe(axes[1], rows, "frechet")
    shared_legend(figure, axes[1])
    return figure


EXPERIMENT = Experiment(
    name="cycle",
    question="Does x0 -> x_t -> x0 end where it began, with times drawn by clamp and by gap*?",
    cells=plan,
    draw=draw,
)
