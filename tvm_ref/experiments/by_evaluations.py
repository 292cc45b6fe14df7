"""Experiments that train networks of squares for equal steps and compare them by evaluations of a sample."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import by_nfe, panels, shared_legend
from .measures import quality, real_quality
from .training import Plan, cells

NFES = (1, 2, 4, 8)


def by_evaluations(name: str, question: str, variants: Mapping[str, dict[str, Any]]) -> Experiment:
    """An experiment with these variants: by name, the settings in which each differs from the others."""

    def plan(setting: Setting) -> list[Cell]:
        base = bases.squares(setting, steps=150)
        nfes, samples = setting.pick(quick=(1,), small=NFES, full=NFES), setting.pick(quick=32, small=500, full=2048)
        return cells(
            Plan(
                base=base,
                variants=dict(variants),
                seeds=setting.pick(quick=1, small=3, full=3),
                measure=quality(setting, nfes, samples),
                measured_with={"nfes": nfes, "samples": samples},
                floor=lambda seed: real_quality(setting, base.data, samples, seed),
            ),
            setting,
        )

    def draw(rows: pd.DataFrame) -> Figure:
        """Wasserstein distance and misfit by evaluations."""
        figure, axes = panels(2)
        for panel, name in zip(axes, ("w2", "misfit"), strict=True):
            by_nfe(panel, rows, name)
        shared_legend(figure, axes[0], columns=1 + len(variants))
        return figure

    return Experiment(name=name, question=question, cells=plan, draw=draw)
