"""The tables that a verification prints: failing rows first, then a summary, or every row of a few cases."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flashjvp_commands.terminal import Fitted
from reports.verification import Verdict, worst

from ..oracles.attention import NAMES
from .plan import FLOAT64

Rows = Sequence[Verdict]
MOST_FAILURES_SHOWN = 50
GOOD, BAD = "green", "bold red"


def failures(rows: Rows) -> RenderableType | None:
    """Every row that failed, worst first, each over the command that reproduces it alone."""
    failing = sorted((row for row in rows if not row.ok), key=lambda row: -_sortable(row.share))
    if not failing:
        return None
    result = Table(title=f"{len(failing)} rows failed", title_style=BAD, border_style="red", show_lines=True)
    for name in ("row", "error", "budget", "worst row", "budget", "error / budget"):
        result.add_column(name, justify="left" if name == "row" else "right", overflow="fold")
    for row in failing[:MOST_FAILURES_SHOWN]:
        what = f"{_name(row)}  {row.backend}  {row.dtype}  {row.quantity}: {row.reason}"
        cells = (row.error, row.budget, row.worst_row, row.worst_row_budget, row.share)
        text = Text.assemble((what, BAD), "\n", (row.reproduce, "cyan"))
        result.add_row(text, *(_number(x) for x in cells))
    if len(failing) > MOST_FAILURES_SHOWN:
        result.caption = f"the {len(failing) - MOST_FAILURES_SHOWN} others are in the CSV"
    return Fitted(result)


def every_row(rows: Rows) -> list[RenderableType]:
    """All rows of a few cases: the errors of every tensor over their budgets, and the identities."""
    tables: list[RenderableType] = []
    if direct := [row for row in rows if row.check == FLOAT64 and row.quantity in NAMES]:
        result = Table(title="relative error against float64, and below it the budget", show_lines=True)
        for name in ("case", "backend", "type", "verdict", "of budget", *NAMES, "to dense"):
            result.add_column(name, justify="right" if name in (*NAMES, "of budget", "to dense") else "left")
        for (case, backend, dtype), part in _groups(direct, lambda row: (row.case, row.backend, row.dtype)):
            cells = [_with_budget([row for row in part if row.quantity == name]) for name in NAMES]
            ratio = worst(row.ratio_to_dense for row in part)
            result.add_row(case, backend, dtype, _verdict(part), _share(part), *cells, _number(ratio))
        tables.append(Fitted(result, names=3))
    if others := [row for row in rows if row.check != FLOAT64]:
        result = Table(title="identities: distance of the two sides, relative")
        for name in ("identity", "case", "backend", "type", "quantity", "verdict", "error", "budget"):
            result.add_column(name, justify="right" if name in ("error", "budget") else "left")
        for row in others:
            names = (row.check, row.case, row.backend, row.dtype, row.quantity)
            result.add_row(*names, _verdict([row]), _number(row.error), _number(row.budget))
        tables.append(Fitted(result, names=3))
    return tables


def condensed(rows: Rows) -> list[RenderableType]:
    """By backend, type and group of cases the worst error over budget of each tensor; then the identities."""
    result = Table(
        title="against float64: the largest error over its budget (1 or less holds), of all cases of a group",
        caption="to dense: median and 9th decile of the ratio of errors to those of dense attention in the same type",
        caption_justify="left",
    )
    for name in ("backend", "type", "cases about", "verdict", "cases", *NAMES, "to dense"):
        result.add_column(name, justify="right" if name in (*NAMES, "cases", "to dense") else "left", no_wrap=True)
    direct = [row for row in rows if row.check == FLOAT64]
    previous = ""
    for (backend, dtype, group), part in _groups(direct, lambda row: (row.backend, row.dtype, row.group)):
        head = f"{backend} {dtype}"
        if previous and head != previous:
            result.add_section()
        names = (backend, dtype) if head != previous else ("", "")
        previous = head
        cells = [_share([row for row in part if row.quantity == name]) for name in NAMES]
        count = len({row.case for row in part})
        result.add_row(*names, group, _verdict(part), str(count), *cells, _ratios(part))
    return [Fitted(result, names=3), *_identities([row for row in rows if row.check != FLOAT64])]


def _identities(rows: Rows) -> list[RenderableType]:
    if not rows:
        return []
    columns = _groups(rows, lambda row: (row.backend, row.dtype))
    result = Table(title="identities: the largest distance of the two sides over its budget, of all cases")
    for name in ("identity", "verdict"):
        result.add_column(name)
    for (backend, dtype), _ in columns:
        result.add_column(f"{backend}\n{dtype}", justify="right")
    for (check,), part in _groups(rows, lambda row: (row.check,)):
        cells = [_share([row for row in part if (row.backend, row.dtype) == pair]) for pair, _ in columns]
        result.add_row(check, _verdict(part), *cells)
    return [Fitted(result)]


def _groups(rows: Rows, key: Callable[[Verdict], tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[Verdict]]]:
    found: dict[tuple[str, ...], list[Verdict]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())


def _verdict(rows: Iterable[Verdict]) -> Text:
    failing = sum(not row.ok for row in rows)
    return Text(f"{failing} failed", style=BAD) if failing else Text("ok", style=GOOD)


def _share(rows: Rows) -> Text:
    """The worst error over budget; a check without a number says whether it held."""
    if not rows:
        return Text("")
    ok = all(row.ok for row in rows)
    share = worst(row.share for row in rows)
    text = _number(share) if share is not None else "held" if ok else "failed"
    return Text(text, style="" if ok else BAD)


def _with_budget(rows: Rows) -> Text:
    text = "\n".join(f"{_number(row.error)}\n{_number(row.budget)}" for row in rows)
    return Text(text, style="" if all(row.ok for row in rows) else BAD)


def _ratios(rows: Rows) -> str:
    """Median and 9th decile: the largest says nothing where dense attention happens to be exact."""
    ratios = sorted(row.ratio_to_dense for row in rows if row.ratio_to_dense is not None)
    return f"{_number(ratios[len(ratios) // 2])}, {_number(ratios[len(ratios) * 9 // 10])}" if ratios else ""


def _name(row: Verdict) -> str:
    return row.case if row.check == FLOAT64 else f"{row.check}:{row.case}"


def _sortable(share: float | None) -> float:
    return float("inf") if share is None or share != share else share


def _number(value: float | None) -> str:
    """At most 7 characters."""
    if value is None:
        return ""
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.1e}"
