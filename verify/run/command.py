"""`python -m verify`: every check on every case, backend and type that a device serves, as tables, CSV, figures."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from flashjvp_commands import arguments as types
from flashjvp_commands import outputs, terminal
from flashjvp_commands.ending import FAILED, HELD, UNUSABLE, stopped_status
from flashjvp_commands.entry import program
from reports.environment import now, slug
from reports.verification import COLUMNS, Verdict, worst, write_verdicts
from reports.verify_plot import plot_sweeps

from ..arguments import announce, device_for, missing, rows_path
from . import table, workers
from .judge import Run, judge
from .plan import BACKENDS, CHECKS, DTYPES, FLOAT64, GROUPS, Plan, UnknownCaseError


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything held, 1 when a row failed, 2 when there is nothing to verify, 130 when interrupted."""
    options = parser().parse_args(arguments)
    console = terminal.console()
    device, start = device_for(options.device), now()
    if problem := missing(torch.device(device)):
        console.print(problem, style="red", highlight=False, soft_wrap=True)
        return UNUSABLE
    plan = Plan(device, options.quick, options.backend, options.dtype, options.seed)
    try:
        plan = plan.everything() if options.case is None else plan.only(options.case)
    except UnknownCaseError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return UNUSABLE
    run = Run.here(device, options.seed, start)
    path = None
    if options.out is not None or options.case is None:
        try:
            path = rows_path(options.out, device, f"verify-{slug(run.columns['run'])}.csv.gz", COLUMNS)
        except outputs.OutputError as error:
            console.print(f"--out: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return UNUSABLE
    announce(console, run.columns, run.seed, plan.skipped)
    if options.case is not None:
        return report(alone(plan, run), plan, path, options, console)
    found: dict[int, list[Verdict]] = {}
    try:
        together(plan, run, console, found)
    except KeyboardInterrupt as stop:
        if path is not None and found:
            write_verdicts(outputs.stopped_name(path), in_order(found))
            console.print(f"stopped after {len(found)} of {len(plan.tasks)} checks; their rows are in "
                          f"{outputs.stopped_name(path)}", highlight=False, soft_wrap=True)  # fmt: skip
        return stopped_status(stop)
    return report(in_order(found), plan, path, options, console)


def parser() -> argparse.ArgumentParser:
    options = types.parser(
        program("verify"),
        description="Is this installation right, on this device, in these types? Results of every backend against "
        "float64 and against identities, within error budgets derived from rounding.",
        epilog="With one of these words in front it does something else (WORD --help says more):\n\n"
        "  model      a whole network and its training losses\n"
        "  published  tvm_ref beside the published code\n"
        "  faults     plants bugs and shows that they are caught\n"
        "  codegen    what the kernels compile to, without a GPU",
    )
    options.add_argument(
        "--device", type=types.a_device, metavar="DEVICE", help="cpu, cuda or cuda:1; default the GPU if any"
    )
    options.add_argument(
        "--backend", type=types.names_out_of(BACKENDS), default=list(BACKENDS), metavar="NAME,...",
        help=f"out of {', '.join(BACKENDS)} (all)",
    )  # fmt: skip
    options.add_argument(
        "--dtype",
        type=types.names_out_of(DTYPES),
        default=list(DTYPES),
        metavar="NAME,...",
        help=f"out of {', '.join(DTYPES)} (all)",
    )
    options.add_argument("--quick", action="store_true", help="a sample: about a minute on two idle cores")
    options.add_argument(
        "--seed", type=types.seed, default=0, metavar="N", help="of all numbers and of the random cases (0)"
    )
    options.add_argument("--case", metavar="NAME", help="one case, as a failing row names it: CASE or CHECK:CASE")
    options.add_argument(
        "--out", type=outputs.path_with(".csv.gz", ".csv"), metavar="PATH",
        help=f"for the rows: {outputs.HELP % '.csv.gz or .csv'}; figures go beside it; default "
        "reports/data/<machine>, and nowhere with --case",
    )  # fmt: skip
    return options


def alone(plan: Plan, run: Run) -> list[Verdict]:
    """The rows of a few tasks, in this process: an exception ends it, with its traceback."""
    return [row for task in plan.tasks for backend in task.backends for row in judge(task, run, backend)]


def together(plan: Plan, run: Run, console: Console, found: dict[int, list[Verdict]]) -> None:
    """Puts the rows of all tasks into `found`, by the task's place in the plan, as they come."""
    places = {id(task): i for i, task in enumerate(plan.tasks)}
    with terminal.Bar(console, "checks", len(plan.tasks)) as bar, contextlib.ExitStack() as stack:
        judged = stack.enter_context(contextlib.closing(workers.verdicts(plan.tasks, run, workers.count(run.device))))
        for task, rows in judged:
            found[places[id(task)]] = rows
            for command in dict.fromkeys(row.reproduce for row in rows if not row.ok):
                bar.console.print(f"failed: {command}", style="red", highlight=False, soft_wrap=True)
            bar.advance_by(1, f"{task.name} {task.dtype} is judged")


def in_order(found: dict[int, list[Verdict]]) -> list[Verdict]:
    """The rows in one order, whatever process was quicker."""
    rows = [row for i in sorted(found) for row in found[i]]
    orders: tuple[tuple[str, list[str]], ...] = (
        ("check", [FLOAT64, *CHECKS]),
        ("backend", list(BACKENDS)),
        ("dtype", list(DTYPES)),
        ("group", list(GROUPS.values())),
    )
    return sorted(rows, key=lambda row: [order.index(getattr(row, column)) for column, order in orders])


def report(rows: list[Verdict], plan: Plan, path: Path | None, options: argparse.Namespace, console: Console) -> int:
    """Tables, files and the summary line; the exit status."""
    if not rows:
        console.print("nothing to verify: no check applies to what was asked for", style="red")
        return UNUSABLE
    tables = table.every_row(rows) if options.case is not None else table.condensed(rows)
    failures = table.failures(rows)
    for part in (failures, *tables):
        if part is not None:
            console.print(part)
    if path is not None:
        stem = path.with_name(path.name.partition(".csv")[0])
        write_verdicts(path, rows)
        for written in (path, *plot_sweeps(rows, stem)):
            console.print(f"wrote {written}", highlight=False, soft_wrap=True)
    failing = sum(not row.ok for row in rows)
    style = "bold red" if failing else "bold green"
    console.print(summary(rows, plan), style=style, highlight=False, soft_wrap=True)
    return FAILED if failing else HELD


def summary(rows: Sequence[Verdict], plan: Plan) -> str:
    """One line: how many rows held, and how near the nearest came to its budget."""
    failing = sum(not row.ok for row in rows)
    share = worst(row.share for row in rows)
    nearest = "" if share is None else f"; largest error over budget {share:.2f}"
    said = f"{failing} of {len(rows)} rows FAILED" if failing else f"all {len(rows)} rows held"
    where = f"{len(plan.tasks)} checks on {plan.device}, seed {plan.seed}"
    return f"{said} ({where}{nearest})"
