"""Markdown tables of a sweep and of a verification, each over the machine, commit and command that it came from."""

import math
import re
from collections.abc import Sequence

import pandas as pd

from .schema import Row, frame
from .style import MODES, OURS, look, number, order, series, times, whole_mode

# Columns of a row that tell shapes apart, and their heads.
SHAPE = {
    "batch": "B",
    "heads": "H",
    "kv_heads": "Hkv",
    "queries": "N",
    "head_dim": "D",
    "dtype": "type",
    "causal": "causal",
    "mask": "mask",
}
ERROR_AND_BUDGET = re.compile(r"(\S+) \(budget (\S+)\)")  # as bench/gate.py writes them
PEERS = ("official", "rcm")  # which have no installable package: the user names a checkout
GRADIENTS = ("d_q", "d_k", "d_v", "d_q_t", "d_k_t", "d_v_t")


def sweep_table(rows: Sequence[Row], run: Sequence[Row], reasons: bool = True) -> str:
    """A line for each shape and mode of `rows`, a column for each provider, and below what they are; `run` is all rows.

    Cells hold the median latency in ms, for flashjvp the throughput in TFLOP/s, for the others in brackets their
    latency over flashjvp's, and the peak memory above the inputs in MiB. A result that left its error budget has its
    latency and its largest error over budget, but no ratio; any other failure is its status. A provider that is
    unsupported in all its rows has no column: a sentence names it with its reasons. With `reasons`, a list says why
    other cells have no number or no ratio. Raises ValueError without a row, or
    with rows of several runs.
    """
    if len(runs := {row.run for row in (*rows, *run)}) != 1:
        raise ValueError(f"a table compares providers of one run, these rows are of {len(runs)}")
    data = frame(rows).assign(panel=[whole_mode(row.mode) for row in rows])
    data["series"] = [series(row.provider, row.mode) for row in rows]
    data["rank"] = data["panel"].map(list(MODES).index)
    varying = [name for name in SHAPE if data[name].nunique() > 1]
    if (data["heads"] == data["kv_heads"]).all() and "kv_heads" in varying:
        varying.remove("kv_heads")
    absent = (data["status"] == "unsupported").groupby(data["series"]).transform("all")
    names = order(data["series"][~absent])
    lines = []
    shapes = data.drop_duplicates([*SHAPE, "panel"]).sort_values(
        ["heads", "head_dim", "queries", "rank"], kind="stable"
    )
    for _, shape in shapes.iterrows():
        cells = [str(shape[name]) for name in varying] + [MODES[shape["panel"]]]
        same = data[(data[[*SHAPE, "panel"]] == shape[[*SHAPE, "panel"]]).all(axis=1)]
        ours = _latency(same[same["series"] == OURS])
        lines.append(cells + [_cell(same[same["series"] == name], ours) for name in names])
    heads = [*(SHAPE[name] for name in varying), "", *(look(name).label for name in names)]
    table = markdown(heads, lines, left=len(varying) + 1)
    source = _source(rows, run, any("" in cells[len(varying) + 1 :] for cells in lines))
    parts = [table, _reasons(data[~absent]) if reasons else "", _without_column(data[absent]), source]
    return "\n\n".join(part for part in parts if part)


def command(rows: Sequence[Row]) -> str:
    """The command line of a sweep that measures these rows; PATH is where the reader has a peer."""
    first = rows[0]
    words = ["python -m bench.sweep"]
    if first.preset:
        words.append(f"--preset {first.preset}")
    else:
        words.append(f"--seq {_values(rows, 'queries')}")
        names = [name for name in SHAPE if name not in ("queries", "causal", "mask")]
        if all(row.heads == row.kv_heads for row in rows):
            names.remove("kv_heads")
        words += [f"--{name.replace('_', '-')} {_values(rows, name)}" for name in names]
        words += ["--causal"] if first.causal else []
        words += [f"--mask {_values(rows, 'mask')}"] if any(row.mask != "none" for row in rows) else []
        modes = [row.mode if row.provider == OURS else whole_mode(row.mode) for row in rows]
        words.append(f"--modes {','.join(dict.fromkeys(modes))}")
    providers = order(row.provider for row in rows)
    words.append(f"--providers {','.join(providers)}")
    return " ".join(words + [f"--peer {name}=PATH" for name in providers if name in PEERS])


def verification_table(data: pd.DataFrame) -> str:
    """Errors of one verification by backend and type: `data` has the columns of reports.verification.Verdict."""
    lines = []
    for (backend, dtype), part in data.groupby(["backend", "dtype"], sort=True):
        direct = part[part["check"] == "float64"]
        errors = [direct[direct["quantity"].isin(names)]["error"] for names in (("o",), ("o_t",), GRADIENTS)]
        shares = direct["error"] / direct["budget"].where(direct["budget"] > 0)
        cells = [f"{error.median():.1e}" if error.notna().any() else "" for error in errors]
        cells += [f"{direct['ratio_to_dense'].median():.2f}", f"{shares.max():.2f}"]
        lines.append([str(backend), str(dtype), *cells, str(len(part)), str(int((~part["ok"]).sum()))])
    heads = ["backend", "type", "o", "o_t", "gradients", "to dense", "of budget", "verdicts", "failed"]
    first = data.iloc[0]
    source = (
        f"{first['machine']}; driver {first['driver']}, torch {first['torch_version']}, triton "
        f"{first['triton_version']}, commit {short(first['commit'])}, {first['run'][:10]}. By `python -m verify`. "
        "o, o_t, gradients: median relative error against float64 over all cases; to dense: median of its ratio to "
        "that of dense attention in the same type; of budget: the largest error over what it may be."
    )
    return f"{markdown(heads, lines, left=2)}\n\n{source}"


def short(commit: str) -> str:
    """Seven digits of a commit, and whether the tree differed from it."""
    digits, _, state = commit.partition("-")
    return digits[:7] + (f"-{state}" if state else "")


def measured_by(rows: Sequence[Row], run: Sequence[Row]) -> str:
    """Where the rows of a run were measured, and by which command."""
    first = rows[0]
    fixed = [
        first.machine,
        first.dtype if len({row.dtype for row in rows}) == 1 else "",
        *(
            f"{SHAPE[name]}={getattr(first, name)}"
            for name in ("batch", "heads", "queries", "head_dim")
            if len({getattr(row, name) for row in rows}) == 1
        ),
        "causal" if all(row.causal for row in rows) else "",
    ]
    ceilings: dict[str, list[float]] = {}
    for row in rows:
        ceilings.setdefault(row.dtype, []).append(row.ceiling_tflops)
    products = [_rates(rates) + f" ({dtype})" * (len(ceilings) > 1) for dtype, rates in ceilings.items()]
    return (
        f"{', '.join(x for x in fixed if x)}; driver {first.driver}, torch {first.torch_version}, "
        f"triton {first.triton_version}, commit {short(first.commit)}, {first.date_utc[:10]}; in the same run a matrix "
        f"product ran at {' and '.join(products)} and a copy at {number(first.ceiling_gbs)} GB/s. "
        f"By `{command(run)}`."
    )


def _source(rows: Sequence[Row], run: Sequence[Row], has_empty_cells: bool) -> str:
    """Where the rows of a run were measured, by which command, and how to read them."""
    legend = ["ms: median latency", "MiB: peak memory above the inputs"]
    if len({row.provider for row in rows}) > 1:
        legend.insert(1, f"in brackets: latency over that of {look(OURS).label} in this run")
    if any(row.mode.startswith("plain-") for row in rows):
        legend.append("without JVP: neither tangents nor their gradients")
    if any(row.mode.startswith("approx-") for row in rows):
        legend.append(f"{look('finite-difference').label} only approximates the tangent")
    if any(row.status == "wrong" for row in rows):
        legend.append("error of budget: the largest error over what it may be, where that is more than 1")
    if has_empty_cells:
        legend.append("an empty cell: no row, as where a preset has no such mode")
    return f"{measured_by(rows, run)} {'; '.join(legend)}."


def _rates(tflops: Sequence[float]) -> str:
    """One rate, or the least and the greatest: each start of a resumed run measures its ceiling."""
    ends = dict.fromkeys((number(min(tflops)), number(max(tflops))))
    return f"{' to '.join(ends)} TFLOP/s"


def _cell(rows: pd.DataFrame, ours: float | None) -> str:
    if rows.empty:
        return ""
    row = rows.iloc[-1]
    if row["status"] not in ("ok", "wrong") or pd.isna(row["latency_p50_ms"]):
        return str(row["status"])
    latency = f"{number(row['latency_p50_ms'])} ms"
    if row["status"] == "wrong":
        return f"{latency}, {_over_budget(row['reason'])}"
    if row["series"] == OURS:
        latency = f"**{latency}**, {number(row['tflops'])} TFLOP/s"
    elif ours and not row["mode"].startswith("plain-"):
        latency += f" ({times(row['latency_p50_ms'] / ours)})"
    return f"{latency}, {number(row['peak_mib'])} MiB"


def _over_budget(reason: str) -> str:
    """The largest error over its budget, of those that the reason of a row names."""
    pairs = [(float(error), float(budget)) for error, budget in ERROR_AND_BUDGET.findall(reason)]
    shares = [float("inf") if not budget or math.isnan(error) else error / budget for error, budget in pairs]
    return f"error {max(shares):.3g} of budget" if shares else "wrong"


def _latency(rows: pd.DataFrame) -> float | None:
    ok = rows[rows["status"] == "ok"]
    return None if ok.empty else float(ok["latency_p50_ms"].iloc[-1])


def _reasons(data: pd.DataFrame) -> str:
    """Why a provider has no number, where the status does not say it."""
    failed = data[~data["status"].isin(["ok", "oom"])]
    lines = []
    for (name, status, reason), part in failed.groupby(["series", "status", "reason"], sort=False):
        modes = ", ".join(MODES[mode] for mode in MODES if mode in set(part["panel"]))
        what = "over budget" if status == "wrong" else status
        lines.append(f"- {look(str(name)).label}, {modes}: {what}, {reason}".replace("|", "\\|"))
    return "\n".join(lines)


def _without_column(data: pd.DataFrame) -> str:
    """The providers that are unsupported in all rows, and why."""
    found = []
    for name in order(data["series"]):
        reasons = data[data["series"] == name]["reason"].unique()
        found.append(f"{look(name).label} ({'; '.join(reasons)})".replace("|", "\\|"))
    return f"Without a column, since unsupported in all of these rows: {', '.join(found)}." if found else ""


def _values(rows: Sequence[Row], name: str) -> str:
    return ",".join(dict.fromkeys(str(getattr(row, name)) for row in rows))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are aligned left, the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))
