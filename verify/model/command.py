"""`python -m verify model`: a DiT block, a small DiT and the objectives of tvm_ref, in every way that the trainer runs
them, against an independent dense network in float64; as tables, CSV and an exit status."""

import argparse
import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashjvp_commands import arguments as types
from flashjvp_commands import outputs, terminal
from flashjvp_commands.ending import FAILED, HELD, UNUSABLE, stopped_status
from flashjvp_commands.entry import program
from reports.environment import now, slug
from reports.schema import write_rows
from reports.verification import worst

from ..arguments import announce, device_for, missing, rows_path
from ..run import workers
from ..run.judge import Run
from ..run.table import BAD, GOOD
from .cases import PARTS, ModelCase, model_plan
from .judge import COLUMNS, ModelVerdict, judge_case, judge_model, lost

QUANTITIES = ("value", "tangent", "gradients", "operators")
Rows = Sequence[ModelVerdict]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything held, 1 when a row failed, 2 when there is nothing to verify, 130 when interrupted."""
    options = parser().parse_args(arguments)
    console = terminal.console()
    device, start = device_for(options.device), now()
    if problem := missing(torch.device(device)):
        console.print(problem, style="red", highlight=False, soft_wrap=True)
        return UNUSABLE
    run = Run.here(device, options.seed, start)
    plan = model_plan(device, options.quick and options.case is None)
    cases = [case for case in plan.cases if options.case in (None, case.name)]
    if not cases:
        console.print(f"--case {options.case}: no such case on {device}", style="red", highlight=False)
        return UNUSABLE
    path, columns = None, (*COLUMNS, *run.columns)
    if options.out is not None or options.case is None:
        try:
            path = rows_path(options.out, device, f"verify-model-{slug(run.columns['run'])}.csv", columns)
        except outputs.OutputError as error:
            console.print(f"--out: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return UNUSABLE
    announce(console, run.columns, run.seed, plan.skipped)
    found: dict[ModelCase, list[ModelVerdict]] = {}
    try:
        source = alone(cases, run) if options.case is not None else together(cases, run)
        with terminal.Bar(console, "cases", len(cases)) as bar, contextlib.closing(source) as judged:
            for case, rows in judged:
                found[case] = rows
                if path is not None:  # what is known so far outlives a run that is cut off
                    lines = [_Line(row, run) for row in in_order(cases, found)]
                    write_rows(outputs.stopped_name(path), lines, columns)
                bar.advance_by(1, f"{case.name} is judged")
    except KeyboardInterrupt as stop:
        if path is not None and found:
            said = f"stopped after {len(found)} of {len(cases)} cases; their rows are in {outputs.stopped_name(path)}"
            console.print(said, highlight=False, soft_wrap=True)
        return stopped_status(stop)
    if path is not None:
        outputs.stopped_name(path).replace(path)
    return report(in_order(cases, found), path, run, options, console)


def parser() -> argparse.ArgumentParser:
    options = types.parser(
        f"{program('verify')} model",
        description="Are whole networks right on this device? "
        + "; ".join(f"{k}: {v}" for k, v in PARTS.items())
        + ".",
    )
    options.add_argument("--device", type=types.a_device, metavar="DEVICE", help="cpu, cuda or cuda:1; default the GPU")
    options.add_argument("--quick", action="store_true", help="a sample, on a CPU without inductor")
    options.add_argument("--seed", type=types.seed, default=0, metavar="N", help="of all weights and numbers (0)")
    options.add_argument("--case", metavar="NAME", help="one case, as a failing row names it")
    options.add_argument(
        "--out", type=outputs.path_with(".csv.gz", ".csv"), metavar="PATH",
        help=f"for the rows: {outputs.HELP % '.csv.gz or .csv'}; default reports/data/<machine>, and nowhere with "
        "--case",
    )  # fmt: skip
    return options


Judged = Generator[tuple[ModelCase, list[ModelVerdict]]]


def alone(cases: Sequence[ModelCase], run: Run) -> Judged:
    """Cases with their rows, judged in this process: an exception ends it, with its traceback."""
    return ((case, judge_model(case, run.device, run.seed)) for case in cases)


def together(cases: Sequence[ModelCase], run: Run) -> Judged:
    """Cases with their rows, as they come from several processes; an exception is a failing row."""
    longest_first = sorted(cases, key=lambda case: (case.compiled != "inductor", case.network != "XL/2 width"))
    return workers.verdicts(longest_first, run, workers.count(run.device), judge=judge_case, lost=lost)


def in_order(cases: Sequence[ModelCase], found: dict[ModelCase, list[ModelVerdict]]) -> list[ModelVerdict]:
    """The rows that there are, whatever process was quicker."""
    return [row for case in cases for row in found.get(case, [])]


def report(rows: Rows, path: Path | None, run: Run, options: argparse.Namespace, console: Console) -> int:
    """Tables and the summary line; the exit status."""
    failing = [row for row in rows if not row.ok]
    for row in failing:
        what = f"{row.part}, {row.network}, {row.precision}, {row.backend}, {row.way}: {row.quantity}"
        size = "" if row.error is None else f" (error {_number(row.error)}, budget {_number(row.budget)})"
        for text, style in ((f"failed: {what}: {row.reason}{size}", BAD), (f"  {row.reproduce}", "cyan")):
            console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
    console.print(terminal.Fitted(table(rows, every=options.case is not None), names=2))
    if path is not None:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    share = worst(row.share for row in rows)
    said = f"{len(failing)} of {len(rows)} rows FAILED" if failing else f"all {len(rows)} rows held"
    nearest = "" if share is None else f"; largest error over budget {share:.2f}"
    style = BAD if failing else f"bold {GOOD}"
    cases = len({row.reproduce for row in rows})
    summary = f"{said} ({cases} cases on {run.device}, seed {run.seed}{nearest})"
    console.print(summary, style=style, highlight=False, soft_wrap=True)
    return FAILED if failing else HELD


class _Line:
    """A row of the CSV: a verdict, then where it was made."""

    def __init__(self, row: ModelVerdict, run: Run) -> None:
        vars(self).update(vars(row) | run.columns)


def table(rows: Rows, *, every: bool = False) -> Table:
    """The worst error over budget of each quantity, by part, type, backend and way; `every`: by network too."""
    result = Table(title="whole networks: the largest error over its budget (1 or less holds)")
    for name in ("part", "networks", "verdict", "type", "backend", "blocks run", *QUANTITIES[:-1]):
        result.add_column(name, justify="right" if name in QUANTITIES else "left")
    groups: dict[tuple[str, ...], list[ModelVerdict]] = {}
    for row in rows:
        network = (row.network,) if every else ()
        groups.setdefault((row.part, row.precision, row.backend, row.way, *network), []).append(row)
    previous = ""
    for (part, precision, backend, way, *_), found in sorted(groups.items(), key=_order):
        if previous not in ("", part):
            result.add_section()
        names = list(dict.fromkeys(row.network for row in found))
        cells = [_share([row for row in found if row.quantity == name]) for name in QUANTITIES[:-1]]
        wrong = sum(not row.ok for row in found)
        verdict = Text(f"{wrong} failed", style=BAD) if wrong else Text("ok", style=GOOD)
        shown = names[0] if len(names) == 1 else str(len(names))
        result.add_row(part if part != previous else "", shown, verdict, precision, backend, way, *cells)
        previous = part
    return result


def _order(item: tuple[tuple[str, ...], list[ModelVerdict]]) -> int:
    return list(PARTS).index(item[0][0])


def _share(rows: Rows) -> Text:
    share = worst(row.share for row in rows)
    return Text(_number(share), style="" if all(row.ok for row in rows) else BAD)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if 0.01 <= abs(value) < 100 else f"{value:.1e}"
