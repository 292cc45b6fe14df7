"""Rows, table and figure of `python -m bench.precision`: errors of half types against the size of scores."""

from dataclasses import dataclass, fields
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import COLOURS, MARKERS

TENSORS = ("o", "o_t", "d_q", "d_k", "d_v", "d_q_t", "d_k_t", "d_v_t")
PROVIDERS = {"dense": "dense attention, the same type", "default": "flashjvp", "high": 'flashjvp, precision="high"'}
PANELS = {"tangent o_t": ("o_t",), "worst of six gradients": TENSORS[2:]}


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """Errors of one provider at scores of one size, or its times in milliseconds."""

    dtype: str
    head_dim: int
    heads: int
    tokens: int
    provider: str
    scores: float = 1.0
    o: float | None = None
    o_t: float | None = None
    d_q: float | None = None
    d_k: float | None = None
    d_v: float | None = None
    d_q_t: float | None = None
    d_k_t: float | None = None
    d_v_t: float | None = None
    fwd_ms: float | None = None
    bwd_ms: float | None = None
    machine: str
    torch_version: str
    triton_version: str
    commit: str


PRECISION_COLUMNS = tuple(field.name for field in fields(PrecisionRow))


def precision_table(rows: pd.DataFrame) -> str:
    """Errors by default and how many times smaller they are with precision="high", then its times."""
    errors, first = rows[rows["fwd_ms"].isna()], rows.iloc[0]
    lines = [f"| type | D | scores | {' | '.join(TENSORS)} |", f"| --- | ---: | ---: | {' | '.join(['---:'] * 8)} |"]
    for (dtype, head_dim, scores), part in errors.groupby(["dtype", "head_dim", "scores"], sort=False):
        of = part.set_index("provider")
        cells = [f"{of.at['default', x]:.1e} / {of.at['default', x] / of.at['high', x]:.2g}" for x in TENSORS]
        lines.append(f"| {dtype} | {head_dim} | {scores:g} | {' | '.join(cells)} |")
    said = [*_times(rows[~rows["fwd_ms"].isna()])]
    return "\n".join(lines) + (
        f'\n\nRelative errors of whole tensors by default / how many times smaller they are with precision="high" '
        f"({first['tokens']} tokens, {first['heads']} heads). {' '.join(said)} {first['machine']}; torch "
        f"{first['torch_version']}, triton {first['triton_version']}, commit {str(first['commit'])[:7]}. By `python -m "
        "bench.precision`."
    )


def _times(rows: pd.DataFrame) -> list[str]:
    found = []
    for (dtype, head_dim), part in rows.groupby(["dtype", "head_dim"], sort=False):
        of = part.set_index("provider")
        words = [
            f"{of.at['default', x]:.3g} -> {of.at['high', x]:.3g} ms = {of.at['high', x] / of.at['default', x]:.2f}"
            for x in ("fwd_ms", "bwd_ms")
        ]
        shape = f"1, {part['heads'].iloc[0]}, {part['tokens'].iloc[0]}, {head_dim}"
        found.append(f"{shape} in {dtype}: forward and JVP {words[0]}, backward {words[1]}.")
    return found


def draw_precision(rows: pd.DataFrame) -> Figure:
    """The largest error of all head dims against the size of scores, a line a provider; a column for each type."""
    errors = rows[rows["fwd_ms"].isna()]
    dtypes = list(dict.fromkeys(errors["dtype"]))
    figure, grid = plt.subplots(
        len(PANELS), len(dtypes), figsize=(1.0 + 1.6 * len(dtypes), 3.4), layout="constrained", sharex=True,
        sharey="row", squeeze=False,
    )  # fmt: skip
    for column, dtype in enumerate(dtypes):
        part = errors[errors["dtype"] == dtype].groupby(["provider", "scores"])[list(TENSORS)].max().reset_index()
        for line, (name, tensors) in enumerate(PANELS.items()):
            axes: Any = grid[line, column]
            for i, (provider, label) in enumerate(PROVIDERS.items()):
                of = part[part["provider"] == provider].sort_values("scores")
                axes.plot(
                    of["scores"], of[list(tensors)].max(axis=1), color=COLOURS[i], marker=MARKERS[i], markersize=3.5,
                    linewidth=1.1, label=label,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("log")
            if line == 0:
                axes.set_title(dtype)
            if column == 0:
                axes.set_ylabel(name)
            if line == len(PANELS) - 1:
                axes.set_xlabel("typical score (nats)")
    figure.suptitle(f"{rows['machine'].iloc[0]}: relative error against float64", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1)
    return figure
