"""The profile of a training step by group: a markdown table, and a stacked bar for each step."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from .style import COLOURS, DPI, STYLE
from .tables import markdown

PROFILE_COLUMNS = (
    "preset", "precision", "residual", "compile", "checkpointing", "cuda_graph", "parallel", "gpus", "batch",
    "accumulate", "objective", "detach", "tokens", "group", "ms", "busy_ms", "gib", "tflop", "floor_ms", "kernels",
    "tbytes_per_s", "tflops", "torch", "device", "commit",
)  # fmt: skip
# Columns of files from before the residual stream, objective and tokens could be chosen.
_ADDED = ("residual", "objective", "detach", "tokens")
OLD_PROFILE_COLUMNS = tuple(name for name in PROFILE_COLUMNS if name not in _ADDED)
STEP_OF = [*PROFILE_COLUMNS[: PROFILE_COLUMNS.index("group")], "commit"]


def profile_table(data: pd.DataFrame) -> str:
    """A line for each group of one step: `data` has PROFILE_COLUMNS."""
    whole = data["ms"].sum()
    lines = [
        [
            row["group"], f"{row['ms']:.1f}", f"{row['ms'] / whole:.0%}", f"{row['busy_ms']:.1f}",
            f"{row['gib']:.2f}", f"{row['tflop']:.2f}", _shown(row["floor_ms"]), f"{row['kernels']:.0f}",
        ]
        for _, row in data.iterrows()
    ]  # fmt: skip
    lines.append(["step", f"{whole:.1f}", *[""] * 6])
    heads = ["group", "ms", "share", "ms of kernels", "GiB moved", "TFLOP", "floor, ms", "kernels"]
    first = data.iloc[0]
    rates = f"Floors: {first['tbytes_per_s']:.3g} TB/s and {first['tflops']:.3g} TFLOP/s, measured in the same run. "
    rates += f"{first['device']}; torch {first['torch']}; code: {first['commit'][:7]}."
    return f"{markdown(heads, lines, left=1)}\n\n{rates}"


def draw_profile(data: pd.DataFrame, path: Path) -> None:
    """Draws a bar of groups for each step of `data` (PROFILE_COLUMNS), with the floor of each group as a tick."""
    steps = list(data.groupby(STEP_OF, sort=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 1.2 + 0.5 * len(steps)), layout="constrained")
        for place, (_, rows) in enumerate(steps):
            left = 0.0
            for colour, (_, row) in zip(COLOURS, rows.iterrows(), strict=True):
                axes.barh(place, row["ms"], left=left, color=colour, label="" if place else row["group"])
                if row["floor_ms"] > 0:
                    axes.plot([left + row["floor_ms"]] * 2, [place - 0.4, place + 0.4], color="white", linewidth=1.2)
                left += row["ms"]
        axes.set_yticks(range(len(steps)), [_label(rows.iloc[0]) for _, rows in steps])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_xlabel("ms of a step; white: the least that a group's bytes or products take")
        figure.legend(loc="outside upper center", ncols=4)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _label(row: pd.Series) -> str:
    where = f"{row['precision']}, {row['parallel']}, {row['gpus']} GPU, {row['batch']} x {row['tokens']}"
    where += f", {row['objective']}{', detached' if row['detach'] else ''}"
    where += ", bfloat16 stream" if row["residual"] == "bfloat16" else ""
    return f"{where}\ncheckpointing {row['checkpointing']}, {row['commit'][:7]}"


def _shown(ms: float) -> str:
    return "" if pd.isna(ms) else f"{ms:.1f}"
