"""Figures of a verification: error against length, head dim and score size, a panel a type and a group of tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .panels import set_aside
from .plot import save
from .style import COLOURS, MARKERS, STYLE
from .verification import Verdict, frame


@dataclass(frozen=True)
class Sweep:
    """A group of rows that differ in one column, and how that column is called on the axis."""

    group: str
    column: str
    label: str
    file: str


SWEEPS = (
    Sweep("error against length", "keys", "tokens N", "length"),
    Sweep("error against head dim", "head_dim", "head dim D", "head-dim"),
    Sweep("error against scores", "magnitude", "typical score (nats)", "scores"),
)
TENSORS = (
    ("output o", ("o",)),
    ("tangent o_t", ("o_t",)),
    ("worst of six gradients", ("d_q", "d_k", "d_v", "d_q_t", "d_k_t", "d_v_t")),
)
DTYPES = ("bfloat16", "float16", "float32", "float64")
BACKENDS = ("triton", "tiled", "reference")
LINES = ("-", "-.", ":")
DENSE, BUDGET = "#000000", "#d0d0d0"
LARGEST_POWER = 3  # scores from here on are named by their power of ten
MOST_LABELS = 4
FEW_DECADES = 2.0


def plot_sweeps(rows: Sequence[Verdict], stem: Path) -> list[Path]:
    """Writes a PNG beside `stem` for each sweep that has rows, and returns their paths."""
    found = figures(rows, stem)
    with plt.rc_context(STYLE):
        for path, draw in found.items():
            save(draw(), path)
    return list(found)


def figures(rows: Sequence[Verdict], stem: Path) -> dict[Path, Callable[[], Figure]]:
    """The figures of a verification: where each goes, beside `stem`, and how it is drawn."""
    measured = [row for row in rows if row.error is not None]
    chosen = {sweep: [row for row in measured if row.group == sweep.group] for sweep in SWEEPS}
    return {
        stem.with_name(f"{stem.name}-{sweep.file}.png"): partial(draw_sweep, part, sweep)
        for sweep, part in chosen.items()
        if part
    }


def draw_sweep(rows: Sequence[Verdict], sweep: Sweep) -> Figure:
    """Relative Frobenius error against float64 of each backend and of dense attention, with the budget above them."""
    data = frame(rows)
    dtypes = [dtype for dtype in DTYPES if dtype in set(data["dtype"])]
    figure, grid = plt.subplots(
        len(TENSORS), len(dtypes), figsize=(1.0 + 1.8 * len(dtypes), 5.4), layout="constrained", sharex=True,
        squeeze=False,
    )  # fmt: skip
    for column, dtype in enumerate(dtypes):
        for line, (name, tensors) in enumerate(TENSORS):
            axes = grid[line, column]
            _panel(axes, data[(data["dtype"] == dtype) & data["quantity"].isin(tensors)], sweep.column)
            if line == 0:
                axes.set_title(dtype)
            if column == 0:
                axes.set_ylabel(name)
            if line == len(TENSORS) - 1:
                axes.set_xlabel(sweep.label)
        _share_limits(list(grid[:, column]))
    figure.suptitle(f"{data['machine'].iloc[0]}: relative error against float64   ({_fixed(data, sweep)})", fontsize=10)
    entries = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    order = [label for label in (*BACKENDS, "dense attention in the same type", "budget") if label in entries]
    figure.legend([entries[x] for x in order], order, loc="outside lower center", ncols=len(order))
    return figure


def _panel(axes: Axes, data: pd.DataFrame, column: str) -> None:
    """The largest error of the panel's tensors against `column`; everything up to the budget is shaded.

    An error of zero has no place on the axis: its line has a gap. The points of the backends stand side by side.
    """
    worst = data.groupby(["backend", column], sort=True)[["error", "dense_error", "budget"]].max().reset_index()
    common = worst.groupby(column)[["dense_error", "budget"]].max()
    axes.set_xscale("log", base=10 if column == "magnitude" else 2)
    axes.set_yscale("log", nonpositive="mask")
    measured = worst[["error", "dense_error", "budget"]].to_numpy()
    measured = measured[measured > 0]
    low, high = (measured.min() / 2, measured.max() * 1.5) if len(measured) else (0.1, 1.0)
    axes.set_ylim(low, high)
    axes.plot(common.index, common["budget"], color="#808080", linewidth=1.0)
    for i, backend in enumerate(BACKENDS):
        line = worst[worst["backend"] == backend]
        (drawn,) = axes.plot(
            line[column], line["error"], LINES[i], color=COLOURS[i], marker=MARKERS[i], markersize=3.5,
            markeredgewidth=0, linewidth=1.1, zorder=3 + i,
            label=backend if (line["error"] > 0).any() else "_none",
        )  # fmt: skip
        set_aside(drawn, i, len(BACKENDS))
    dense = "dense attention in the same type"
    axes.plot(common.index, common["dense_error"], "--", color=DENSE, linewidth=1.0, zorder=7, label=dense)
    axes.fill_between(common.index, low / 1e9, common["budget"], color=BUDGET, alpha=0.35, linewidth=0, label="budget")
    if len(worst):
        _ticks(axes, sorted(worst[column].unique()), column)


def _ticks(axes: Axes, values: list[float], column: str) -> None:
    """A tick for every value of the column; those far enough apart are labelled."""
    labelled, apart = values[:1], (values[-1] / values[0]) ** (1 / MOST_LABELS)
    for value in values:
        labelled += [value] if value / labelled[-1] >= apart * 0.999 and value > labelled[-1] else []

    def name(value: float, _: object) -> str:
        power = round(math.log10(value))
        if value not in labelled:
            return ""
        return f"$10^{power}$" if column == "magnitude" and power >= LARGEST_POWER else f"{value:g}"

    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(name))


def _share_limits(column: Sequence[Axes]) -> None:
    """One error axis for the panels of a type, with ticks between powers of ten where it spans few of them."""
    limits = [axes.get_ylim() for axes in column]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    decades = math.log10(high / low)
    for axes in column:
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < FEW_DECADES else (1.0,), numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(_power))
        axes.yaxis.set_minor_locator(NullLocator())


def _power(value: float, _: object) -> str:
    power = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10**power)
    return f"$10^{{{power}}}$" if factor == 1 else f"${factor}\\cdot10^{{{power}}}$"


def _fixed(data: pd.DataFrame, sweep: Sweep) -> str:
    """What is the same in every row."""
    names = {"keys": "N={}", "head_dim": "D={}", "magnitude": "scores of {:g}"}
    same = [text.format(data[x].iloc[0]) for x, text in names.items() if x != sweep.column and data[x].nunique() == 1]
    return ", ".join(same)
