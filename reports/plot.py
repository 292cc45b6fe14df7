"""Figures of a sweep: latency and memory of every provider, on log-log axes or, for a single length, as bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .schema import Row, frame

# Okabe and Ito's colours, told apart with every common colour blindness; markers and hatches repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
LINES = {"fwd": "--", "bwd": ":", "fwd+bwd": "-"}
MODE_NAMES = {"fwd": "forward + JVP", "bwd": "backward", "fwd+bwd": "forward + JVP + backward"}
PANELS = (("latency_p50_ms", "latency (ms)"), ("peak_mib", "peak memory above inputs (MiB)"))
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def plot_sweep(rows: Sequence[Row], path: Path) -> Path:
    """Writes the figure of one run as a PNG and returns its path."""
    with plt.rc_context(STYLE):
        figure = draw_sweep(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    plt.close(figure)
    return path


def draw_sweep(rows: Sequence[Row]) -> Figure:
    """A panel of latency and a panel of memory for the rows of one run; a row that failed is marked by its status."""
    data = frame(rows)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.3), layout="constrained")
    draw = _bars if data["queries"].nunique() == 1 else _lines
    for panel, (column, label) in zip(axes, PANELS, strict=True):
        draw(panel, data, column)
        panel.set_title(label, loc="left")
    figure.suptitle(_title(data), fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4 if draw is _bars else 2))
    return figure


def _lines(axes: Axes, data: pd.DataFrame, column: str) -> None:
    """Against the length, log-log: a colour and marker a provider, a line style a mode; failures at the upper edge."""
    for (provider, mode), group in data.groupby(["provider", "mode"], sort=False):
        style = _style(data, provider)
        ok = group[group["status"] == "ok"].sort_values("queries")
        axes.plot(
            ok["queries"],
            ok[column],
            LINES[mode],
            color=style["color"],
            marker=style["marker"],
            markersize=4.5,
            linewidth=1.4,
            label=f"{provider}, {MODE_NAMES[mode]}",
        )
    axes.set_xscale("log", base=2)
    failed = data[data["status"] != "ok"].drop_duplicates(["provider", "queries", "status"])
    if data[column].notna().any():
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        if len(failed):
            axes.set_ylim(bottom, top * (top / bottom) ** 0.12)  # room for their names, above every line
    else:
        axes.set_yticks([])
    lengths = sorted(data["queries"].unique())
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)  # also where nothing but failures is drawn
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens N")
    for queries, group in failed.groupby("queries"):
        for i, row in enumerate(group.itertuples()):
            axes.annotate(
                f"\N{MULTIPLICATION SIGN} {row.status}",
                xy=(queries, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, -9 * i),
                textcoords="offset points",
                ha="center",
                va="top",
                color=_style(data, row.provider)["color"],
                fontsize=8,
            )


def _bars(axes: Axes, data: pd.DataFrame, column: str) -> None:
    """One length: a group of bars a mode, the value above each bar; a failure is its status in place of the bar."""
    providers = list(dict.fromkeys(data["provider"]))
    modes = list(dict.fromkeys(data["mode"]))
    width = 0.8 / len(providers)
    top = data[column].max()
    for i, provider in enumerate(providers):
        style = _style(data, provider)
        chosen = (
            data[data["provider"] == provider].drop_duplicates("mode", keep="last").set_index("mode").reindex(modes)
        )
        places = [j + (i - (len(providers) - 1) / 2) * width for j in range(len(modes))]
        heights = chosen[column].fillna(0.0)
        axes.bar(
            places,
            heights,
            0.92 * width,
            color=style["color"],
            hatch=style["hatch"],
            edgecolor="white",
            linewidth=0,
            label=provider,
        )
        for place, value, status in zip(places, chosen[column], chosen["status"], strict=True):
            text = str(status) if status != "ok" else _short(value)
            height = 0 if status != "ok" else value
            axes.annotate(text, (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(modes)), [MODE_NAMES[mode] for mode in modes])
    axes.tick_params(axis="x", length=0)
    if top > 0:
        axes.set_ylim(0, 1.1 * top)


def _style(data: pd.DataFrame, provider: str) -> dict[str, str]:
    i = list(dict.fromkeys(data["provider"])).index(provider) % len(COLOURS)
    return {"color": COLOURS[i], "marker": MARKERS[i], "hatch": HATCHES[i]}


def _title(data: pd.DataFrame) -> str:
    """Machine and dtype, then what is the same in every row."""

    def same(column: str, text: str) -> list[str]:
        values = data[column].unique()
        return [text.format(values[0])] if len(values) == 1 else []

    fixed = [
        *same("batch", "B={}"),
        *same("heads", "H={}"),
        *([] if (data["heads"] == data["kv_heads"]).all() else same("kv_heads", "Hkv={}")),
        *same("queries", "N={}"),
        *same("head_dim", "D={}"),
        *(["causal"] if data["causal"].all() else []),
    ]
    return f"{data['machine'].iloc[0]}, {' and '.join(data['dtype'].unique())}   ({', '.join(fixed)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
