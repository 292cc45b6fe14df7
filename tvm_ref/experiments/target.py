"""Experiment `target`: the EMA of the target network."""

import pandas as pd
from matplotlib.figure import Figure

from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import by_nfe, panels, shared_legend
from .measures import quality, real_quality
from .training import Plan, cells

NFES = (1, 2, 4, 8)
DECAYS = (0.0, 0.9, 0.99, 0.999)


def plan(setting: Setting) -> list[Cell]:
    """A variant for each decay."""
    base = bases.squares(setting, steps=150)
    nfes, samples = setting.pick(quick=(1,), small=NFES, full=NFES), setting.pick(quick=32, small=500, full=2048)
    return cells(
        Plan(
            base=base,
            variants={f"{decay:g}": {"optim.target_ema": decay} for decay in DECAYS},
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
    shared_legend(figure, axes[0], columns=5)
    return figure


EXPERIMENT = Experiment(
    name="target",
    question="How fast should the target network follow the network?",
    cells=plan,
    draw=draw,
)
