"""Experiment `bound`: both sides of the Wasserstein bound on eight Gaussians, over training."""

import math
from collections.abc import Iterator

import pandas as pd
import torch
from matplotlib.figure import Figure

from ..data.toys import toy_points
from ..quality import transport_bound
from ..quality.metrics import wasserstein2
from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import GREY, look, panels, variants_of
from .results import REAL, chosen, summary
from .training import Measured, Plan, Trained, cells

WITHOUT = {"model.norm": "layer", "model.qk_norm": False, "model.modulation_norm": False}
SHOWN = {
    "log10_groenwall": "bound of the paper's form",
    "log10_linear": "bound with exp(int L)",
    "log10_one_sided": "bound with the one-sided constant",
    "log10_integral": "the loss, integrated",
    "log10_endpoint": "squared error of the endpoint",
    "log10_w2": "squared W2",
}


def plan(setting: Setting) -> list[Cell]:
    """With the Lipschitz changes of the network and without, measured four times."""
    count = setting.pick(quick=32, small=500, full=2000)

    def measure(trained: Trained) -> Iterator[Measured]:
        found = transport_bound.bound(trained.model, count, trained.config.run.seed)._asdict()
        for name in ("w2", "endpoint", "integral"):
            yield Measured(f"log10_{name}", math.log10(found.pop(name)))
        yield from (Measured(name, value) for name, value in found.items())

    return cells(
        Plan(
            base=bases.gaussians(setting, steps=200),
            variants={"with Lipschitz control": {}, "without": WITHOUT},
            seeds=setting.pick(quick=1, small=3, full=3),
            at=setting.pick(quick=(1.0,), small=(0.25, 0.5, 1.0), full=(0.05, 0.25, 0.5, 1.0)),
            measure=measure,
            measured_with={"count": count},
            floor=lambda seed: _fresh(count, seed),
        ),
        setting,
    )


def _fresh(count: int, seed: int) -> Iterator[Measured]:
    one, two = (toy_points("eight_gaussians", count, first + seed) for first in (5000, 6000))
    distance = wasserstein2(*(torch.from_numpy(points) for points in (one, two)))
    yield Measured("log10_w2", 2 * math.log10(distance))


def draw(rows: pd.DataFrame) -> Figure:
    """A panel for each network: the bounds above what they bound, over the steps."""
    figure, axes = panels(2, height=3.0)
    floor = chosen(rows, variant=REAL, figure="log10_w2")["value"].mean()
    for panel, name in zip(axes, variants_of(rows), strict=True):
        for number, (column, label) in enumerate(SHOWN.items()):
            means = summary(chosen(rows, variant=name, figure=column), "step").sort_values("step")
            panel.errorbar(means["step"], means["mean"], yerr=means["std"], label=label, **look(number))
        panel.axhline(floor, color=GREY, linestyle=":", linewidth=1, label="squared W2 of two fresh sets")
        panel.set_yscale("symlog", linthresh=4)
        panel.set_ylim(-2, 1.5 * rows.loc[rows["figure"] == "log10_groenwall", "value"].max())
        panel.set_title(name, loc="left")
        panel.set_xlabel("step")
    axes[0].set_ylabel("decimal logarithm")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


EXPERIMENT = Experiment(
    name="bound",
    question="Does the Wasserstein bound say anything about the samples of a trained network?",
    cells=plan,
    draw=draw,
)
