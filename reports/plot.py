"""Figures of a sweep: latency, memory and throughput against the length, speed-ups, and bars for a single length."""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .panels import (
    FAILURE,
    LATENCY,
    MEMORY,
    failures_of,
    horizontal_bars,
    length_axis,
    lines,
    lines_of_failures,
    mark_failures,
    speedup_bars,
    speedups,
    value_axis,
)
from .schema import Row, frame
from .style import DPI, MODES, STYLE, order, series, whole_mode

GROUP = ["heads", "kv_heads", "head_dim", "dtype", "causal", "mask"]
WIDTH = 7.2  # inches
AXIS = 0.4  # inches beside a panel
MOST_COLUMNS = 3
LONG_LABEL = 24  # letters
MOST_COLOURS = 64
FEWEST_LENGTHS = 3


def plot_sweep(rows: Sequence[Row], path: Path) -> Path:
    """Writes one figure of a run as a PNG and returns its path: latency and memory of every provider.

    Lines against the length, or bars where the run has one length only. Raises ValueError without a row.
    """
    with plt.rc_context(STYLE):
        save(draw_sweep(rows), path)
    return path


def save(figure: Figure, path: Path, source: str = "") -> None:
    """Writes a PNG under a name of this process's own and renames it into place; `source` goes into its metadata.

    It has as many colours as lines on white need, and takes a quarter of the space of one with all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    plt.close(figure)
    said = PngInfo()
    if source:
        said.add_text("Source", source)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(MOST_COLOURS, dither=Image.Dither.NONE)
    few.save(temporary, "PNG", optimize=True, pnginfo=said, dpi=(DPI, DPI))
    temporary.replace(path)


def draw_sweep(rows: Sequence[Row]) -> Figure:
    """Latency over memory; a column for each group of shapes and mode, the fullest mode where those are too many."""
    data = _prepared(rows)
    if data["queries"].nunique() == 1:
        return draw_bars(rows)
    modes = _modes(data)
    groups = _groups(data)
    if len(groups) * len(modes) > MOST_COLUMNS:
        modes = modes[-1:]
    columns = [
        (_join(MODES[mode], _group_name(data, group)), group[group["panel"] == mode])
        for group in groups
        for mode in modes
    ]
    return _line_figure(data, [[(name, part, what) for name, part in columns] for what in (LATENCY, MEMORY)])


def draw_lines(rows: Sequence[Row], what: tuple[str, str]) -> Figure:
    """One quantity against the length on logarithmic axes: a row of panels for each mode, a column for each group."""
    data = _prepared(rows)
    grid = [
        [(_join(MODES[mode], _group_name(data, group)), group[group["panel"] == mode], what) for group in _groups(data)]
        for mode in _modes(data)
    ]
    return _line_figure(data, grid)


def draw_bars(rows: Sequence[Row]) -> Figure:
    """Runs of one length: a bar for each provider with its value; a failure is its status in place of the bar."""
    data = _prepared(rows)
    modes, groups = _modes(data), _groups(data)
    rows_of_grid = [(group, what) for group in groups for what in (LATENCY, MEMORY)]
    providers = order(data["series"])
    figure, grid = plt.subplots(
        len(rows_of_grid), len(modes), layout="constrained", squeeze=False,
        figsize=(WIDTH, 0.5 + len(rows_of_grid) * (0.6 + 0.19 * len(providers))),
    )  # fmt: skip
    for (group, (column, label)), panels in zip(rows_of_grid, grid, strict=True):
        for mode, axes in zip(modes, panels, strict=True):
            horizontal_bars(axes, group[group["panel"] == mode], column, providers)
            axes.set_title(_join(MODES[mode], _group_name(data, group)), loc="left")
            axes.set_xlabel(label)
            if mode != modes[0]:
                axes.tick_params(labelleft=False)
    figure.suptitle(_title(data), fontsize=9)
    return figure


def has_speedup(rows: Sequence[Row]) -> bool:
    """Whether draw_speedup has something to show that draw_bars has not: several lengths."""
    data = _prepared(rows)
    return data["queries"].nunique() > 1 and bool(_ratios(data))


def draw_speedup(rows: Sequence[Row]) -> Figure:
    """How many times faster flashjvp is than each peer in the same mode and on the same shape, of one run.

    Raises ValueError where no peer was measured beside it.
    """
    data = _prepared(rows)
    ratios, groups = _ratios(data), _groups(data)
    if not ratios:
        raise ValueError("no peer was measured on a shape and in a mode that flashjvp was, too")
    figure, grid = plt.subplots(
        len(ratios), len(groups), figsize=(_width(len(groups)), 0.9 + 1.75 * len(ratios)), layout="constrained",
        squeeze=False, sharey="row",
    )  # fmt: skip
    for mode, panels in zip(ratios, grid, strict=True):
        for group, found, axes in zip(groups, ratios[mode], panels, strict=True):
            speedup_bars(axes, found, group[group["panel"] == mode])
            axes.set_title(_join(MODES[mode], _group_name(data, group)), loc="left")
        low = min(found.min().min() for found in ratios[mode] if found.size)
        high = max(found.max().max() for found in ratios[mode] if found.size)
        panels[0].set_ylim(min(0.9, low / 1.1), max(2.0, high) * 3)  # room for the numbers
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up")
    for axes in grid[-1]:
        axes.set_xlabel("tokens N")
    figure.suptitle(f"Speed-up of flashjvp over\N{HORIZONTAL ELLIPSIS}   {_title(data)}", fontsize=9)
    _legend(figure, list(grid.flat))
    return figure


def _line_figure(data: pd.DataFrame, panels: list[list[tuple[str, pd.DataFrame, tuple[str, str]]]]) -> Figure:
    """A grid of line panels (title, rows, quantity) whose rows of panels share an axis, over one legend."""
    shape = (len(panels), len(panels[0]))
    width = _width(shape[1])
    failures = [[failures_of(part, width / shape[1] - AXIS) for _, part, _ in row] for row in panels]
    height = 1.0 + 1.95 * shape[0] + sum(map(lines_of_failures, failures)) * FAILURE / 72
    figure, grid = plt.subplots(*shape, figsize=(width, height), layout="constrained", squeeze=False, sharey="row")
    for row, line, failed in zip(panels, grid, failures, strict=True):
        for (title, part, what), axes in zip(row, line, strict=True):
            lines(axes, part, what[0])
            axes.set_title(title, loc="left")
            length_axis(axes, sorted(data["queries"].unique()))
        value_axis(list(line), row[0][2][0])
        line[0].set_ylabel(row[0][2][1])
        mark_failures(list(line), failed)
    for axes in grid[-1]:
        axes.set_xlabel("tokens N")
    figure.suptitle(_title(data), fontsize=9)
    _legend(figure, list(grid.flat))
    return figure


def _prepared(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a frame with the columns `panel`, the mode beside which a row is drawn, and `series`.

    Of several lengths, it holds the shapes that were measured at three of them, or at as many as there are, and the
    series of more than one, which make a line.
    """
    if not rows:
        raise ValueError("a figure needs at least one row")
    if len(runs := {row.run for row in rows}) > 1:
        raise ValueError(f"a figure compares providers of one run, these rows are of {', '.join(sorted(runs))}")
    data = frame(rows).assign(panel=[whole_mode(row.mode) for row in rows])
    data["series"] = [series(row.provider, row.mode) for row in rows]
    lengths = data.groupby(GROUP)["queries"].transform("nunique")
    data = data[lengths >= min(FEWEST_LENGTHS, lengths.max())]
    of_series = data.groupby("series")["queries"].transform("nunique")
    return data[of_series >= min(2, of_series.max())]


def _modes(data: pd.DataFrame) -> list[str]:
    return [mode for mode in MODES if mode in set(data["panel"])]


def _groups(data: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows by shape, length apart; where one length was measured with several batch sizes, by batch size, too."""
    batches = data.groupby([*GROUP, "queries"])["batch"].nunique().max()
    return [group for _, group in data.groupby(GROUP + (["batch"] if batches > 1 else []), sort=True)]


def _ratios(data: pd.DataFrame) -> dict[str, list[pd.DataFrame]]:
    """Mode -> the speed-ups of every group, for modes that have any. Attention without a JVP does less: no peer."""
    groups = [group[~group["mode"].str.startswith("plain-")] for group in _groups(data)]
    found = {mode: [speedups(group[group["panel"] == mode]) for group in groups] for mode in _modes(data)}
    return {mode: ratios for mode, ratios in found.items() if any(part.size for part in ratios)}


def _group_name(data: pd.DataFrame, group: pd.DataFrame) -> str:
    """What tells a group of rows from the others."""
    return ", ".join(text for name, text in _shape(group).items() if data[name].nunique() > 1)


def _shape(data: pd.DataFrame) -> dict[str, str]:
    """Column -> how a value of it, the same in every row, is written; a batch that varies is written as its range."""
    first, batch = data.iloc[0], data["batch"]
    texts = {"batch": f"B={first['batch']}" if batch.nunique() == 1 else f"B={batch.max()} to {batch.min()}"}
    texts |= {"heads": f"H={first['heads']}"}
    texts |= {"kv_heads": f"Hkv={first['kv_heads']}"} if first["kv_heads"] != first["heads"] else {}
    texts |= {"head_dim": f"D={first['head_dim']}", "dtype": first["dtype"]}
    texts |= {"causal": "causal"} if first["causal"] else {}
    return texts | ({"mask": f"{first['mask']} mask"} if first["mask"] != "none" else {})


def _title(data: pd.DataFrame) -> str:
    """The machine, then what is the same in every row."""
    same = [text for name, text in _shape(data).items() if data[name].nunique() == 1]
    same += [f"N={data['queries'].iloc[0]}"] if data["queries"].nunique() == 1 else []
    return f"{data['machine'].iloc[0]}   ({', '.join(same)})"


def _join(*texts: str) -> str:
    return ", ".join(text for text in texts if text)


def _width(columns: int) -> float:
    return max(WIDTH, 2.3 * columns)


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One entry for each provider of any panel, below them all."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        has_lines = any(isinstance(handle, Line2D) for handle in entries.values())
        columns = 5 if not has_lines else 4 if max(map(len, entries)) < LONG_LABEL else 3
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), columns))
