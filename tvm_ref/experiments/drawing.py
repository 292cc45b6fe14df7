"""What the figures share: colours, error bars over seeds, and the level of real data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from .results import REAL, chosen, last_steps, summary

# Okabe and Ito's colours, told apart with every common colour blindness; markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
GREY = "#767676"
DPI = 200
WIDTH = 7.0  # inches
MOST_OF_PLAIN = 2000.0  # the largest number by the smallest of a logarithmic axis that shows more than powers of ten
LABELS = {
    "frechet": "Frechet distance of features", "accuracy": "class accuracy", "precision": "precision",
    "recall": "recall", "coverage": "coverage", "w2": "2-Wasserstein distance", "misfit": "misfit of squares",
    "gradient_norm": "gradient norm", "loss": "loss",
}  # fmt: skip
STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#e2e2e2",
    "grid.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "lines.linewidth": 1.2, "lines.markersize": 4, "errorbar.capsize": 2,
}  # fmt: skip


def panels(columns: int, rows: int = 1, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a page, and its axes row by row."""
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, height * rows), layout="constrained", squeeze=False)
    return figure, list(np.asarray(grid).flat)


def save(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours, which all figures have enough of: a third of the bytes."""
    figure.savefig(path, format="png", dpi=DPI)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few.save(path, format="png", optimize=True, dpi=(DPI, DPI))


def variants_of(rows: pd.DataFrame) -> list[str]:
    """The variants, in their order, but for the real data."""
    return [name for name in rows["variant"].unique() if name != REAL]


def look(number: int) -> dict[str, Any]:
    """Colour and marker of the variant with this number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def against(axes: Axes, rows: pd.DataFrame, column: str, figure: str, *, log: bool = True) -> None:
    """A line for each variant: means of a figure against a column, with bars of one standard deviation over seeds."""
    names = variants_of(rows)
    for number, name in enumerate(names):
        means = summary(chosen(rows, variant=name, figure=figure), column).sort_values(column)
        if len(means):
            shift = 1 + 0.01 * (number - (len(names) - 1) / 2)  # so that bars do not hide each other
            axes.errorbar(means[column] * shift, means["mean"], yerr=means["std"], label=name, **look(number))
    axes.set_ylabel(LABELS.get(figure, figure))
    if log:
        axes.set_yscale("log")
    real_level(axes, rows, figure)
    if log:
        plain_numbers(axes.yaxis, *axes.get_ylim())


def by_nfe(axes: Axes, rows: pd.DataFrame, figure: str, *, log: bool = True) -> None:
    """`against` the number of network evaluations, after the last step of each run."""
    kept = last_steps(rows[(rows["nfe"] > 0) | (rows["variant"] == REAL)])
    against(axes, kept, "nfe", figure, log=log)
    ticks = sorted(set(kept["nfe"]) - {0})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("network evaluations for a sample")


def real_level(axes: Axes, rows: pd.DataFrame, figure: str) -> None:
    """A dotted line at what real data get."""
    values = chosen(rows, variant=REAL, figure=figure)["value"]
    if len(values):
        axes.axhline(values.mean(), color=GREY, linestyle=":", linewidth=1, label="real data")


def bars(axes: Axes, rows: pd.DataFrame, figure: str, names: Sequence[str], colours: int) -> None:
    """A horizontal bar for each variant, in order from the top, with its standard deviation over seeds, on a
    logarithmic axis; after so many colours they begin anew."""
    found = summary(chosen(rows, figure=figure), "variant").set_index("variant")
    for place, name in enumerate(names):
        if name in found.index:
            mean, std = found.loc[name, "mean"], found.loc[name, "std"]
            axes.barh(place, mean, xerr=std, color=look(place % colours)["color"], height=0.7)
    axes.set_yticks(range(len(names)), list(names))
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(LABELS.get(figure, figure))
    axes.set_xscale("log")
    plain_numbers(axes.xaxis, *axes.get_xlim())


def plain_numbers(axis: Axis, low: float, high: float) -> None:
    """Of a logarithmic axis from low to high: 0.5, 1, 2, 5, ... where these are not too many, else powers of ten."""
    if high < MOST_OF_PLAIN * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 6 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def shared_legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend below all panels, of what one of them shows."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
