"""How far flashjvp is from plain attention, call by call: a heat map of a sweep's cells, and the worst of them.

A ratio is the time of a call over that of PyTorch's own attention without a JVP, of the same shape in the same run: 3
is parity, since a JVP takes three times the products.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .schema import Row
from .style import MODES, OURS, STYLE
from .tables import markdown, measured_by

PRESET, PLAIN = "coverage", "plain"
SHAPE = ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim", "dtype", "causal", "mask")
WORST = 10
PARITY, BAR = 3.0, 6.0
USUAL_BATCH, USUAL_LENGTH = 2, 4096
COLUMNS = 8  # of cells in a panel


def is_coverage(rows: Sequence[Row]) -> bool:
    """Whether rows are of the preset that this file is for."""
    return bool(rows) and all(row.preset == PRESET for row in rows)


def ratios(rows: Sequence[Row]) -> pd.DataFrame:
    """A line for each call of flashjvp: mode, ratio (NaN where one of the two was not measured), status, reason, and
    `call` and `group`, which say what it is."""
    plain = {
        (_shape(row), row.mode): row.latency_p50_ms for row in rows if row.provider == PLAIN and row.status == "ok"
    }
    found = []
    for row in rows:
        if row.provider != OURS or row.mode not in MODES:
            continue
        ours = row.latency_p50_ms if row.status == "ok" else None
        against = plain.get((_shape(row), f"plain-{row.mode}"))
        ratio = np.nan if ours is None or against is None else ours / against
        group, call = _named(row)
        found.append({
            "group": group, "call": call, "dtype": row.dtype, "mode": row.mode, "latency_p50_ms": row.latency_p50_ms,
            "ratio": ratio, "status": row.status, "reason": row.reason,
        })  # fmt: skip
    return pd.DataFrame(found)


def draw_coverage(rows: Sequence[Row]) -> Figure:
    """The ratio of every call as a colour and a number: a panel for each kind of difference, a row for each mode."""
    data = ratios(rows)
    modes = [mode for mode in MODES if mode in set(data["mode"])]
    groups = list(dict.fromkeys(data["group"]))
    lines = {name: -(-data[data["group"] == name]["call"].nunique() // COLUMNS) * len(modes) for name in groups}
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(7.2, 0.8 + 0.42 * sum(lines.values()) + 0.35 * len(groups)), layout="constrained",
        squeeze=False, height_ratios=[lines[name] for name in groups],
    )  # fmt: skip
    norm, colours = LogNorm(PARITY / 2, BAR * 2), plt.colormaps["RdYlGn_r"]
    for name, axes in zip(groups, panels[:, 0], strict=True):
        part = data[data["group"] == name]
        calls = list(dict.fromkeys(part["call"]))
        values = part.pivot_table(index="call", columns="mode", values="ratio", aggfunc="last", dropna=False)
        grid = np.full((lines[name], COLUMNS), np.nan)
        for i, call in enumerate(calls):
            for k, mode in enumerate(modes):
                line, column = i // COLUMNS * len(modes) + k, i % COLUMNS
                grid[line, column] = values.loc[call, mode] if mode in values else np.nan
                ratio = grid[line, column]
                text = "\n".join((*call.split(", "), f"{ratio:.1f}" if ratio == ratio else "none"))
                colour = _legible_on(colours(norm(ratio))) if ratio == ratio else "black"
                axes.text(column, line, text, ha="center", va="center", fontsize=5, color=colour)
        image = axes.imshow(np.ma.masked_invalid(grid), cmap=colours, norm=norm, aspect="auto")
        axes.set_yticks(range(lines[name]), [MODES[mode] for mode in modes] * (lines[name] // len(modes)))
        axes.set_xticks([])
        axes.grid(False)
        axes.set_title(name, loc="left")
    bar = figure.colorbar(image, ax=panels[:, 0].tolist(), label="time over that of plain attention", shrink=0.5)
    bar.set_ticks([PARITY / 2, PARITY, BAR, BAR * 2], labels=["1.5", "3", "6", "12"])
    bar.minorticks_off()
    return figure


def _legible_on(colour: Sequence[float]) -> str:
    """Black or white, whichever stands out more from a colour (red, green, blue and so on, from 0 to 1)."""
    red, green, blue = colour[:3]
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "white"


def plot_coverage(rows: Sequence[Row], path: Path) -> Path:
    """Draws into a file and returns its path."""
    from .plot import save

    with plt.rc_context(STYLE):
        save(draw_coverage(rows), path)
    return path


def worst_table(rows: Sequence[Row]) -> str:
    """The calls that are farthest from plain attention, in markdown; those that gave no time come first."""
    data = ratios(rows)
    failed = data[data["status"] != "ok"]
    slow = data[data["ratio"].notna()].sort_values("ratio", ascending=False, kind="stable")
    lines = [[row["group"], row["call"], MODES[row["mode"]], "", f"{row['status']}: {row['reason']}"]
             for row in failed.to_dict("records")]  # fmt: skip
    lines += [
        [row["group"], row["call"], MODES[row["mode"]], f"{row['latency_p50_ms']:.3g}", f"{row['ratio']:.2f}"]
        for row in slow.to_dict("records")
    ]
    over = int((data["ratio"] > BAR).sum())
    said = f"{len(data)} calls; {over} take more than {BAR:g} times as long as plain attention, {len(failed)} gave no"
    said += f" time.{_farthest_of_half_types(slow)}"
    table = markdown(("what", "call", "mode", "ms", "of plain"), lines[:WORST], 3)
    return f"{table}\n\n{said} {measured_by(rows, rows)}"


def _farthest_of_half_types(slow: pd.DataFrame) -> str:
    """A sentence about the first of sorted calls that is in float16 or bfloat16, if there is one."""
    found = slow[slow["dtype"].isin(("float16", "bfloat16"))].head(1).to_dict("records")
    return "".join(
        f" In float16 and bfloat16 the farthest takes {row['ratio']:.2f}: {row['group']}, {row['call']}, "
        f"{MODES[row['mode']]}."
        for row in found
    )


def _shape(row: Row) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in SHAPE)


def _named(row: Row) -> tuple[str, str]:
    """What a call differs in from the others, and how it is called beside those that differ in the same."""
    d = row.head_dim
    if row.tangents != "qkv":
        return "tangents of some inputs", f"D={d}, {row.tangents}"
    if row.cotangents != "both":
        return "a cotangent of one output", f"D={d}, {row.cotangents}"
    if row.value_dim is not None:
        return "other value dims", f"D={d}, Dv={row.value_dim}"
    if row.mask != "none" or row.causal:
        return "masks", f"D={d}, {row.mask if row.mask != 'none' else 'causal'}"
    if row.heads != row.kv_heads:
        return "grouped heads", f"D={d}, {row.heads}/{row.kv_heads}"
    if row.dtype != "bfloat16":
        return "other types", f"D={d}, {row.dtype}"
    if (row.batch, row.queries) != (USUAL_BATCH, USUAL_LENGTH):
        return "lengths", f"D={d}, N={row.queries}"
    return "head dims", f"D={d}"
