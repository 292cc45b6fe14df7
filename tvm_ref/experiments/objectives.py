"""Experiment `objectives`: seven objectives under one trainer, network, batch and training time."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import against, by_nfe, panels, shared_legend
from .measures import quality, real_quality
from .results import REAL
from .timing import seconds_per_step
from .training import Plan, cells

NFES = (1, 2, 4, 8, 50)
VARIANTS: dict[str, dict[str, Any]] = {
    "TVM": {"loss.objective": "tvm"},
    "TVM, detached": {"loss.objective": "tvm", "loss.detach": True},
    "MeanFlow": {"loss.objective": "meanflow", "loss.adaptive_power": 1.0, "times.equal_share": 0.75},
    "improved MeanFlow": {"loss.objective": "imf", "loss.adaptive_power": 1.0, "times.equal_share": 0.5},
    "sCM": {"loss.objective": "scm"},
    "shortcut": {"loss.objective": "shortcut", "times.equal_share": 0.75},
    "flow matching": {"loss.objective": "flow"},
}


def plan(setting: Setting) -> list[Cell]:
    """Every objective trains as long as TVM does in the steps of the base."""
    base = bases.images(setting, steps=120)
    nfes = setting.pick(quick=(1, 2), small=NFES, full=NFES)
    samples = setting.pick(quick=32, small=500, full=2500)
    return cells(
        Plan(
            base=base,
            variants=VARIANTS,
            seeds=setting.pick(quick=1, small=3, full=3),
            at=setting.pick(quick=(1.0,), small=(0.5, 1.0), full=(0.25, 0.5, 1.0)),
            measure=quality(setting, nfes, samples),
            measured_with={"nfes": nfes, "samples": samples},
            floor=lambda seed: real_quality(setting, base.data, samples, seed),
            seconds_per_step=seconds_per_step(base, VARIANTS, setting, "objectives"),
        ),
        setting,
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Frechet distance and accuracy by evaluations, and the Frechet distance of one and eight against the time."""
    figure, axes = panels(2, 2)
    by_nfe(axes[0], rows, "frechet")
    by_nfe(axes[1], rows, "accuracy", log=False)
    most = max(nfe for nfe in rows["nfe"].unique() if nfe <= 8)
    for place, nfe in ((2, 1), (3, most)):
        kept = rows[(rows["nfe"] == nfe) | (rows["variant"] == REAL)]
        seconds = {name: part["seconds"].max() for name, part in kept.groupby("variant")}
        parts = (kept["seconds"] / kept["variant"].map(seconds)).round(2)
        against(axes[place], kept.assign(part=parts.fillna(0)), "part", "frechet")
        axes[place].set_xlabel("part of the training time")
        axes[place].set_xticks(sorted(set(parts.dropna())))
        axes[place].set_title(f"{nfe} evaluation{'s' * int(nfe > 1)}", loc="left")
    axes[0].set_title("after the whole time", loc="left")
    shared_legend(figure, axes[0])
    return figure


EXPERIMENT = Experiment(
    name="objectives",
    question="Which objective gives the best samples for a number of evaluations, in equal training time?",
    cells=plan,
    draw=draw,
)
