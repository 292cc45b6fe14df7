"""What is drawn inside one panel of a figure: lines with what failed above them, bars, speed-ups."""

import math
import textwrap
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from .style import GREY, OURS, PLAIN, look, number, order, times

# What a panel of lines shows: the column of its values and how they are called.
LATENCY = ("latency_p50_ms", "latency (ms)")
MEMORY = ("peak_mib", "peak memory (MiB)")
THROUGHPUT = ("tflops", "throughput (TFLOP/s)")
MOST_LENGTHS = 5
DRAWN = ("ok", "wrong")  # statuses of rows that were measured
APART = 1.5  # points between neighbouring series at one length
TITLE_PAD = 6.0  # points between a panel and its title
FAILURE = 9.0  # points that a line of failures takes between them
FAILURE_LETTERS = 20  # of its text, in an inch


class Failure(NamedTuple):
    """A line of failures above a panel: crosses at `lengths` beside a text, `place` lines below the top."""

    text: str
    colour: str
    lengths: list[float]
    place: int
    text_first: bool


def lines(axes: Axes, data: pd.DataFrame, column: str) -> None:
    """A line for each provider; with memory what no implementation can be below, with throughput the ceiling.

    Results that left their error budget are dashed, with open markers, under a name that says so. The points of one
    length stand side by side, a little apart, so that none hides another.
    """
    drawn = [
        (provider, status, rows.sort_values("queries"))
        for provider in order(data["series"])
        for status in DRAWN
        if len(rows := _measured(data[(data["series"] == provider) & (data["status"] == status)], column))
    ]
    for i, (provider, status, rows) in enumerate(drawn):
        style, is_ok = look(provider), status == "ok"
        (line,) = axes.plot(
            rows["queries"], rows[column], color=style.colour, label=style.label if is_ok else over_budget(style.label),
            linestyle="" if len(rows) == 1 else style.line if is_ok else (0, (4, 2)),  # one point makes no line
            marker=style.marker or ("d" if len(rows) == 1 else ""),
            markersize=4.5 if provider == OURS else 3.5, linewidth=2.0 if provider == OURS else 1.1,
            markerfacecolor=style.colour if is_ok else "white", markeredgewidth=0 if is_ok else 0.9,
            zorder=3 if provider == OURS else 4,  # the thick line below the thin ones
        )  # fmt: skip
        set_aside(line, i, len(drawn))
    whole = data[data["mode"] == data["panel"]].sort_values("queries")
    if column == MEMORY[0] and not whole.empty:
        least = whole.assign(least=whole["least_mib"] - whole["inputs_mib"]).groupby("queries")["least"].first()
        axes.plot(least.index, least, "--", color=GREY, linewidth=0.9, label="least possible", zorder=5)
    if column == THROUGHPUT[0]:
        axes.axhline(data["ceiling_tflops"].iloc[0], color=GREY, linestyle="--", linewidth=0.9, label="matrix product")


def set_aside(line: Line2D, i: int, count: int) -> None:
    """Moves series number `i` of `count` a little to the left or right of where its numbers say."""
    assert line.axes is not None
    points = APART * (i - (count - 1) / 2)
    line.set_transform(line.axes.transData + ScaledTranslation(points / 72, 0, line.axes.figure.dpi_scale_trans))


def over_budget(label: str) -> str:
    """The name of a provider's results that left their error budget."""
    return f"{label}, over budget"


def _measured(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return rows[rows[column].notna()]


def value_axis(line: list[Axes], column: str) -> None:
    """Logarithmic; throughput from zero to above the ceiling."""
    if not any(axes.lines for axes in line):
        line[0].set_yticks([])
    elif column == THROUGHPUT[0]:
        line[0].set_ylim(0, line[0].get_ylim()[1] * 1.02)
    else:
        line[0].set_yscale("log")
        line[0].yaxis.set_major_locator(LogLocator(numticks=8))
        line[0].yaxis.set_major_formatter(FuncFormatter(_plain))
        line[0].yaxis.set_minor_locator(NullLocator())


def length_axis(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.35, lengths[-1] * 1.35)  # also where nothing but failures is drawn
    axes.xaxis.set_major_locator(FixedLocator([float(x) for x in lengths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_length))


def failures_of(data: pd.DataFrame, inches: float) -> list[Failure]:
    """What is written above the lines of a panel `inches` wide, the left and the right half filled from the top.

    A line for each provider that failed at some lengths, and for each status that others had throughout as many as
    their names fill. A peer without attention without a JVP lacks nothing that a figure is about: it is not named.
    """
    extra = data["series"].str.endswith(PLAIN) & (data["status"] == "unsupported")
    failed = data[~data["status"].isin(DRAWN) & ~extra]
    middle = (data["queries"].min() * data["queries"].max()) ** 0.5
    found: list[Failure] = []
    throughout: dict[str, list[str]] = {}
    left = right = 0
    for provider in order(failed["series"]):
        rows = failed[failed["series"] == provider].sort_values("queries")
        status = ", ".join(dict.fromkeys(rows["status"]))
        if not data[data["series"] == provider]["status"].isin(DRAWN).any():
            throughout.setdefault(status, []).append(look(provider).label)
            continue
        lengths = [float(x) for x in rows["queries"]]
        on_left, on_right = lengths[0] <= middle, lengths[-1] > middle
        place = max(left * on_left, right * on_right)
        left, right = (place + 1 if on_left else left), (place + 1 if on_right else right)
        found.append(Failure(status, look(provider).colour, lengths, place, not on_left))
    texts = [f"{status}: {', '.join(names)}" for status, names in throughout.items()]
    written = [part for text in texts for part in textwrap.wrap(text, int(FAILURE_LETTERS * inches))]
    found += [Failure(part, GREY, [], place, False) for place, part in enumerate(written, start=max(left, right))]
    return found


def mark_failures(line: list[Axes], panels: list[list[Failure]]) -> None:
    """Writes the failures of a row of panels between each panel and its title, where they stretch no axis."""
    for axes, failures in zip(line, panels, strict=True):
        axes.set_title(axes.get_title(loc="left"), loc="left", pad=TITLE_PAD + FAILURE * lines_of_failures(panels))
        for failure in failures:
            points = TITLE_PAD / 2 + FAILURE * (lines_of_failures(panels) - failure.place - 0.5)
            up = ScaledTranslation(0, points / 72, axes.figure.dpi_scale_trans)
            text: dict[str, Any] = {"s": failure.text, "color": failure.colour, "fontsize": 6.5, "va": "center"}
            text["in_layout"] = False  # the title leaves room for it
            if not failure.lengths:
                axes.text(0.0, 1.0, transform=axes.transAxes + up, **text)
                continue
            axes.plot(
                failure.lengths, [1.0] * len(failure.lengths), "x", color=failure.colour, markersize=3.5,
                markeredgewidth=1.1, transform=axes.get_xaxis_transform() + up, label="_failed", clip_on=False,
            )  # fmt: skip
            x = failure.lengths[0] / 1.12 if failure.text_first else failure.lengths[-1] * 1.12
            side = "right" if failure.text_first else "left"
            axes.text(x, 1.0, ha=side, transform=axes.get_xaxis_transform() + up, **text)


def lines_of_failures(panels: list[list[Failure]]) -> int:
    """How many lines the failures of a row of panels take."""
    return max((failure.place + 1 for failures in panels for failure in failures), default=0)


def horizontal_bars(axes: Axes, data: pd.DataFrame, column: str, providers: list[str]) -> None:
    """A bar a provider, in the same place in every panel; an outline over the error budget, nothing without a row."""
    rows = data.drop_duplicates("series", keep="last").set_index("series").reindex(providers)
    values, statuses = rows[column].where(rows["status"].isin(DRAWN)), rows["status"].fillna("")
    for i, (name, value, status) in enumerate(zip(providers, values.fillna(0.0), statuses, strict=True)):
        colour = look(name).colour
        axes.barh(i, value, 0.72, color=colour if status == "ok" else "white", edgecolor=colour, linewidth=0.8)
        text = f"{number(value)}, over budget" if status == "wrong" else status
        text = number(value) if status == "ok" else text
        axes.annotate(text, (value, i), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(providers)), [look(name).label for name in providers])
    axes.set_ylim(len(providers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if values.max() > 0:
        axes.set_xlim(0, 1.25 * values.max())


def speedups(data: pd.DataFrame) -> pd.DataFrame:
    """Latency of each peer over that of flashjvp: a line a length, a column a peer; of one group and mode.

    Lengths are those of flashjvp, peers those that were measured at one of them; NaN is where a peer was not.
    """
    ok = data[data["status"] == "ok"].sort_values("date_utc").drop_duplicates(["series", "queries"], keep="last")
    wide = ok.pivot(index="queries", columns="series", values="latency_p50_ms")
    if OURS not in wide:
        return pd.DataFrame()
    peers = [name for name in order(wide.columns) if not str(name).startswith(OURS)]
    return wide[peers].div(wide[OURS], axis=0)[wide[OURS].notna()].dropna(axis=1, how="all")


def speedup_bars(axes: Axes, ratios: pd.DataFrame, data: pd.DataFrame) -> None:
    """Bars from 1 on a logarithmic axis, of at most MOST_LENGTHS lengths with the longest among them.

    Where a peer failed, its status stands in place of the bar; `data` are the rows that the ratios are of.
    """
    statuses = {
        (row.series, row.queries): "over budget" if row.status == "wrong" else row.status
        for row in data.itertuples()
        if row.status != "ok"
    }
    step = -(-len(ratios) // MOST_LENGTHS) or 1
    ratios = ratios.iloc[::-1].iloc[::step].iloc[::-1]
    width = 0.84 / max(ratios.shape[1], 1)
    for i, provider in enumerate(ratios.columns):
        style = look(str(provider))
        for place, (length, value) in enumerate(ratios[provider].items()):
            at = place + (i - (ratios.shape[1] - 1) / 2) * width
            text, top, colour = statuses.get((provider, length), ""), 1.0, style.colour
            if not math.isnan(value):
                axes.bar(at, value - 1, 0.9 * width, bottom=1, color=style.colour, label=style.label)
                text, top, colour = times(value), max(value, 1.0), "#000000"
            axes.annotate(
                text, (at, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=5.5,
                rotation=90, color=colour,
            )  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.axhline(1.0, color="#000000", linewidth=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(ratios)), [_length(x, None) for x in ratios.index])
    axes.set_xlim(-0.5, len(ratios) - 0.5)  # also where there is no bar of the last length
    axes.tick_params(axis="x", length=0)


def _plain(value: float, _: object) -> str:
    """100 and 0.01 in full, larger and smaller powers as such."""
    return f"{value:g}" if 1e-3 <= value < 1e5 else f"$10^{{{round(math.log10(value))}}}$"


def _length(value: float, _: object) -> str:
    """256, 1k, 32k: powers of two and their multiples by name."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
