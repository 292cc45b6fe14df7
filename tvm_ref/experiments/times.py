"""Experiment `times`: the distributions of the times of a training step, at equal steps."""

import pandas as pd
from matplotlib.figure import Figure

from ..objective.time_sampling import KINDS
from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import by_nfe, panels, shared_legend
from .measures import quality, real_quality
from .training import Plan, cells

NFES = (1, 2, 4, 8)


def plan(setting: Setting) -> list[Cell]:
    """A variant for each distribution."""
    base = bases.squares(setting, steps=150)
    nfes, samples = setting.pick(quick=(1,), small=NFES, full=NFES), setting.pick(quick=32, small=500, full=2048)
    return cells(
        Plan(
            base=base,
            variants={kind: {"times.kind": kind} for kind in KINDS},
            seeds=setting.pick(quick=1, small=3, full=3),
            measure=quality(nfes, samples),
            measured_with={"nfes": nfes, "samples": samples},
            floor=lambda seed: real_quality(base.data, samples, seed, setting.world),
        ),
        setting,
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Wasserstein distance and misfit by evaluations."""
    figure, axes = panels(2)
    for panel, name in zip(axes, ("w2", "misfit"), strict=True):
        by_nfe(panel, rows, name)
    shared_legend(figure, axes[0], columns=6)
    return figure


EXPERIMENT = Experiment(
    name="times",
    question="Which distribution of the times gives the best samples for a number of evaluations?",
    cells=plan,
    draw=draw,
)
