"""The table that a sweep prints: one line a row, with ratios to the baseline of the same run and shape."""

import dataclasses
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from reports.schema import Row

from .cases import Case
from .providers import BASELINE


def table(rows: Sequence[Row]) -> Table:
    """Every row of one run; a row that was not measured says why."""
    first = rows[0]
    title = f"{first.machine}, {first.dtype}: forward with JVP, and its backward"
    caption = (
        f"time and memory against {BASELINE}: how many times faster, and how many times less peak memory; "
        "least: peak with inputs over inputs + outputs + gradients + row statistics; errors: relative, against float64"
    )
    result = Table(title=title, caption=caption, caption_justify="left")
    for name, justify in (
        ("shape", "left"),
        ("mode", "left"),
        ("provider", "left"),
        ("ms (p20 to p80)", "right"),
        ("time", "right"),
        ("TFLOP/s", "right"),
        ("peak MiB", "right"),
        ("memory", "right"),
        ("least", "right"),
        ("err o, o_t, grad", "left"),
    ):
        result.add_column(name, justify=justify, no_wrap=name != "err o, o_t, grad")  # type: ignore[arg-type]
    baselines = {_case(row): row for row in rows if row.provider == BASELINE}
    order = list(dict.fromkeys(_case(row) for row in rows))
    for case in order:
        same = [row for row in rows if _case(row) == case]
        for i, row in enumerate(same):
            cells = _cells(row, baselines.get(case))
            head = (_shape(row), row.mode) if i == 0 else ("", "")
            result.add_row(*head, *cells, end_section=i == len(same) - 1)
    return result


def describe_row(row: Row) -> str:
    """One line about a row as it comes."""
    name = f"{row.provider:<18} {row.mode:<8} {_shape(row)}"
    if row.status != "ok":
        return f"{name}  {row.status}: {row.reason}"
    return f"{name}  {_number(row.latency_p50_ms)} ms  {_number(row.peak_mib)} MiB"


def _cells(row: Row, baseline: Row | None) -> tuple[Text | str, ...]:
    name = f"{row.provider} (baseline)" if row.provider == BASELINE else row.provider
    errors = ", ".join(f"{error:.1e}" for error in (row.err_o, row.err_o_t, row.err_grad) if error is not None)
    if row.status != "ok":
        return (name, Text(row.status, style="bold red"), "", "", "", "", "", Text(row.reason, style="red"))
    spread = f"{_number(row.latency_p50_ms)} ({_number(row.latency_p20_ms)} to {_number(row.latency_p80_ms)})"
    share = f"{_number(row.tflops)} ({100 * (row.tflops or 0) / row.ceiling_tflops:.0f} %)"
    return (
        name,
        spread,
        _times(baseline, row, "latency_p50_ms"),
        share,
        _number(row.peak_mib),
        _times(baseline, row, "peak_mib"),
        _number(row.peak_ratio),
        errors,
    )


def _case(row: Row) -> tuple[object, ...]:
    return tuple(getattr(row, field.name) for field in dataclasses.fields(Case))


def _shape(row: Row) -> str:
    heads = f"{row.heads}" if row.heads == row.kv_heads else f"{row.heads}/{row.kv_heads}"
    return f"B={row.batch} H={heads} N={row.queries} D={row.head_dim}{' causal' if row.causal else ''}"


def _times(baseline: Row | None, row: Row, column: str) -> str:
    """How many times less than the baseline; empty where either is missing."""
    least, most = getattr(row, column), getattr(baseline, column, None)
    return f"{most / least:.3g}x" if least and most else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
