"""Experiment `guidance`: a constant scale w against random ones, drawn in three ways."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import against, panels, shared_legend
from .measures import quality, real_quality
from .results import REAL
from .training import Plan, Trained, cells

SCALES = (1.0, 1.5, 2.5)
RANGE = (SCALES[0], SCALES[-1])
CONSTANT = "constant, one run for each w"


def plan(setting: Setting) -> list[Cell]:
    """A run for each constant scale, and one for each way of drawing it, which is sampled with all of them."""
    base = bases.images(setting, steps=100)
    nfes, samples = (
        setting.pick(quick=(1,), small=(1, 4), full=(1, 2, 4)),
        setting.pick(quick=32, small=500, full=2500),
    )
    variants: dict[str, dict[str, Any]] = {f"constant, w = {w:g}": {"loss.w": w} for w in SCALES}
    for name, kind in (("uniform in 1/w", "beta"), ("uniform in w", "w"), ("balanced", "balanced")):
        variants[f"random, {name}"] = {"loss.w_random": RANGE, "loss.w_uniform": kind}

    def measure(trained: Trained) -> Any:
        loss = trained.config.loss
        return quality(setting, nfes, samples, SCALES if loss.w_random is not None else [loss.w])(trained)

    return cells(
        Plan(
            base=base,
            variants=variants,
            seeds=setting.pick(quick=1, small=3, full=3),
            measure=measure,
            measured_with={"nfes": nfes, "samples": samples, "scales": SCALES},
            floor=lambda seed: real_quality(setting, base.data, samples, seed),
        ),
        setting,
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Frechet distance and accuracy of one evaluation by w."""
    figure, axes = panels(2)
    constant = rows["variant"].str.startswith("constant")
    merged = rows.assign(variant=rows["variant"].where(~constant, CONSTANT))
    kept = merged[(merged["nfe"] == 1) | (merged["variant"] == REAL)]
    for panel, name in zip(axes, ("frechet", "accuracy"), strict=True):
        against(panel, kept, "w", name, log=name == "frechet")
        panel.set_xlabel("scale w of guidance in sampling, 1 evaluation")
        panel.set_xticks(SCALES)
    shared_legend(figure, axes[0], columns=3)
    return figure


EXPERIMENT = Experiment(
    name="guidance",
    question="What does random guidance cost against a constant one, and does another way of drawing it help?",
    cells=plan,
    draw=draw,
)
