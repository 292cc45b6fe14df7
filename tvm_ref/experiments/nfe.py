"""Experiment `nfe`: whether quality of one evaluation is bought with quality of many."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from . import bases
from .cells import Cell, Experiment, Setting
from .drawing import LABELS, look, panels, real_level, variants_of
from .measures import quality, real_quality
from .results import chosen, summary
from .training import Plan, cells

FEW, MANY = 1, 16
SIZES = ((16, 1), (32, 2), (64, 2), (64, 4))


def plan(setting: Setting) -> list[Cell]:
    """Networks of four sizes, width x blocks; then, of the second one, the weight of the terms and the times s."""
    base = bases.squares(setting, steps=100)
    scale = setting.pick(quick=1, small=1, full=4)
    sizes = [(scale * width, depth) for width, depth in SIZES]
    variants: dict[str, dict[str, Any]] = {
        f"{width} x {depth}": {"model.width": width, "model.depth": depth} for width, depth in sizes
    }
    middle = variants["{} x {}".format(*sizes[1])]
    variants["t = s in half"] = middle | {"times.equal_share": 0.5}
    for mu in (-1.2, 0.4):
        variants[f"mean of s at {mu:g}"] = middle | {"times.s_mu": mu}
    nfes = (FEW, setting.pick(quick=2, small=MANY, full=MANY))
    samples = setting.pick(quick=32, small=500, full=2048)
    return cells(
        Plan(
            base=base,
            variants=variants,
            seeds=setting.pick(quick=1, small=2, full=3),
            measure=quality(setting, nfes, samples),
            measured_with={"nfes": nfes, "samples": samples},
            floor=lambda seed: real_quality(setting, base.data, samples, seed),
        ),
        setting,
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Quality of many evaluations against that of one: a point for each variant, with bars over seeds."""
    figure, axes = panels(2, height=3.0)
    most = rows["nfe"].max()
    for panel, name in zip(axes, ("w2", "misfit"), strict=True):
        for number, variant in enumerate(variants_of(rows)):
            part = chosen(rows, variant=variant, figure=name)
            few, many = (summary(chosen(part, nfe=nfe), "figure").iloc[0] for nfe in (FEW, most))
            panel.errorbar(
                few["mean"],
                many["mean"],
                xerr=few["std"],
                yerr=many["std"],
                linestyle="",
                label=variant,
                **look(number),
            )
        panel.set_xlabel(f"{LABELS[name]}, 1 evaluation")
        panel.set_ylabel(f"{LABELS[name]}, {most} evaluations")
        real_level(panel, rows, name)
        panel.axline((panel.get_xlim()[0], panel.get_xlim()[0]), slope=1, color="#cccccc", linewidth=0.8)
    axes[1].legend(fontsize=6)
    return figure


EXPERIMENT = Experiment(
    name="nfe",
    question="Is quality with one evaluation bought with quality with many?",
    cells=plan,
    draw=draw,
)
