"""Shows a report: a table of rich where that is installed, else plain text."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from .findings import CheckReport, Comparison, Diagnosis, Finding

_WIDTH = 110
_COLOURS = {"wrong": "bold red", "refused": "red", "slow": "yellow", "harmless": "dim", "fine": "green"}
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Row(NamedTuple):
    """Findings that differ in the number of a block only."""

    severity: str
    kind: str
    where: str
    calls: str
    advice: str


def show(report: CheckReport) -> None:
    """Prints it."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(report)
        return
    console = Console()
    for diagnosis in report.diagnoses:
        table = Table(title=_title(diagnosis), title_justify="left", title_style="bold")
        for name in ("severity", "kind", "where", "calls", "what to do"):
            table.add_column(name, justify="right" if name == "calls" else "left", overflow="fold")
        for row in rows(diagnosis.findings):
            table.add_row(*map(escape, row), style=_COLOURS[row.severity])
        if diagnosis.findings:
            console.print(table)
        else:
            console.print(f"[bold]{_title(diagnosis)}[/bold]: nothing was found")
        for line in comparisons(diagnosis, report.detached):
            console.print(escape(line), highlight=False)
        console.print()


def plain(report: CheckReport) -> str:
    """The same in plain text."""
    return "\n\n".join("\n".join(_lines(diagnosis, report.detached)) for diagnosis in report.diagnoses)


def _lines(diagnosis: Diagnosis, detached: bool) -> Iterator[str]:
    yield _title(diagnosis)
    if not diagnosis.findings:
        yield "  nothing was found"
    for row in rows(diagnosis.findings):
        yield f"  {row.severity:<8}  {row.kind} at {row.where} ({row.calls})"
        yield from textwrap.wrap(row.advice, _WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12)
    for line in comparisons(diagnosis, detached):
        yield f"  {line}"


def _title(diagnosis: Diagnosis) -> str:
    return f"{diagnosis.way}: {'right' if diagnosis.ok else 'NOT right'}"


def comparisons(diagnosis: Diagnosis, detached: bool) -> Iterator[str]:
    """What the differences say, a line for each derivative."""
    if not diagnosis.comparisons:
        yield "no derivative was compared: the model, its JVP or the backward pass raises an error"
    yield from map(_compared, diagnosis.comparisons)
    if detached and diagnosis.comparisons:
        yield "gradient of the JVP: left out, as the tangent is detached"


def _compared(found: Comparison) -> str:
    return (
        f"{found.what}: {found.verdict}, {found.off:.1e} off float64 differences (uncertain by {found.uncertainty:.0e})"
    )


def rows(findings: Sequence[Finding]) -> list[Row]:
    """Findings in the order given; those of like places, such as blocks.0.norm1 and blocks.1.norm1, as one row."""
    groups: dict[Finding, list[Finding]] = {}
    for found in findings:
        like = replace(found, path=_NUMBER.sub("*", found.path), calls=0)
        groups.setdefault(like, []).append(found)
    return [_row(like, group) for like, group in groups.items()]


def _row(like: Finding, group: Sequence[Finding]) -> Row:
    where = (like if len(group) > 1 else group[0]).path or "the model"
    calls = sum(found.calls for found in group)
    what = f"{like.kind}: {like.detail}" if like.detail else like.kind
    return Row(like.severity, what, f"{where} ({like.module})", f"{calls} call{'s' * (calls != 1)}", like.advice)
