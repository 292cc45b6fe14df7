"""The table that a sweep prints: one line a row, with ratios to the baseline and to flashjvp on the same shape."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flashjvp_commands.terminal import Fitted
from reports.schema import Row

from .cases import Case
from .providers import BASELINE, SUBJECT

CAPTION = (
    f"x {BASELINE}: how many times faster than {BASELINE}, and how many times less peak memory; {SUBJECT} x: how many "
    f"times faster {SUBJECT} is than the row; %: of a large matrix product in the same run; host: wall time until a "
    "call on a tiny shape returns; peak: above the inputs; least: peak with inputs over inputs + outputs + gradients + "
    "row statistics; errors: relative, against float64"
)
COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("shape", "left"),
    ("mode", "left"),
    ("provider", "left"),
    ("ms (p20 to p80)", "right"),
    (f"x {BASELINE}", "right"),
    (f"{SUBJECT} x", "right"),
    ("TFLOP/s", "right"),
    ("host us", "right"),
    ("peak MiB", "right"),
    (f"x {BASELINE}", "right"),
    ("least", "right"),
    ("err o, o_t, grad", "left"),
)


def table(rows: Sequence[Row]) -> Group:
    """Every row of one run, and below it why those that were not measured were not."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    title = f"{rows[0].machine}, {', '.join(dtypes)}: attention with its JVP, and its backward"
    result = Table(title=title, caption=CAPTION, caption_justify="left")
    for name, justify in COLUMNS:
        result.add_column(name, justify=justify, no_wrap=True)
    ok = [row for row in rows if row.status == "ok"]
    by_name = {name: {_case(row): row for row in ok if row.provider == name} for name in (BASELINE, SUBJECT)}
    for case in dict.fromkeys(_case(row) for row in rows):
        same = [row for row in rows if _case(row) == case]
        for i, row in enumerate(same):
            cells = _cells(row, by_name[BASELINE].get(case), by_name[SUBJECT].get(case))
            shape = _shape(row) + (f" {row.dtype}" if len(dtypes) > 1 else "")
            head = (shape, row.mode) if i == 0 else ("", "")
            result.add_row(*head, *cells, end_section=i == len(same) - 1)
    return Group(Fitted(result, names=3), *_reasons(rows))


def describe_row(row: Row) -> str:
    """One line about a row as it comes."""
    name = f"{row.provider:<19} {row.mode:<13} {_shape(row)}"
    if row.status != "ok":
        return f"{name}  {row.status}: {row.reason}"
    return f"{name}  {_number(row.latency_p50_ms)} ms  {_number(row.peak_mib)} MiB"


def _reasons(rows: Sequence[Row]) -> list[Text]:
    """A line for each reason, with the rows that it concerns counted."""
    failed = [row for row in rows if row.status != "ok"]
    counts: dict[tuple[str, str, str], int] = {}
    for row in failed:
        key = (row.provider, row.status, row.reason)
        counts[key] = counts.get(key, 0) + 1
    return [
        Text(f"{provider}, {status} ({count} row{'s' if count > 1 else ''}): {reason}")
        for (provider, status, reason), count in counts.items()
    ]


def _cells(row: Row, baseline: Row | None, subject: Row | None) -> tuple[Text | str, ...]:
    name = f"{row.provider} (baseline)" if row.provider == BASELINE else row.provider
    errors = ", ".join(f"{error:.1e}" for error in (row.err_o, row.err_o_t, row.err_grad) if error is not None)
    if row.status != "ok":
        status = f"{row.status}: {_number(row.latency_p50_ms)}" if row.latency_p50_ms else row.status
        return (name, Text(status, style="bold red"), *[""] * 7, errors)
    spread = f"{_number(row.latency_p50_ms)} ({_number(row.latency_p20_ms)} to {_number(row.latency_p80_ms)})"
    share = f"{_number(row.tflops)} ({100 * (row.tflops or 0) / row.ceiling_tflops:.0f} %)"
    return (
        name,
        spread,
        _times(baseline, row, "latency_p50_ms"),
        _times(row, subject, "latency_p50_ms"),
        share,
        _number(row.host_us),
        _number(row.peak_mib),
        _times(baseline, row, "peak_mib"),
        _number(row.peak_ratio),
        errors,
    )


def _case(row: Row) -> tuple[object, ...]:
    return tuple(getattr(row, field.name) for field in dataclasses.fields(Case))


def _shape(row: Row) -> str:
    heads = f"{row.heads}" if row.heads == row.kv_heads else f"{row.heads}/{row.kv_heads}"
    words = ["", *(["causal"] if row.causal else []), *([f"{row.mask} mask"] if row.mask != "none" else [])]
    return f"B={row.batch} H={heads} N={row.queries} D={row.head_dim}{' '.join(words)}"


def _times(more: Row | None, less: Row | None, column: str) -> str:
    """How many times more one has than the other; empty where either is missing."""
    most, least = getattr(more, column, None), getattr(less, column, None)
    return f"{most / least:.3g}x" if least and most else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
