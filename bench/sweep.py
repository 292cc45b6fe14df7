"""`python -m bench.sweep`: attention with its JVP, provider beside provider, as a table, a CSV and a figure.

Each provider runs in child processes of its own; an out-of-memory, a crash, a hang or a wrong result is a row, never
the end of the sweep.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flashjvp_commands import ending, outputs, terminal
from reports.coverage import is_coverage, plot_coverage
from reports.environment import DATA, cores, now, slug
from reports.plot import plot_sweep
from reports.schema import Row, SchemaError, append_row, read_rows

from . import isolate, precompile
from .cases import Case, inputs_mib, least_mib, operations
from .environment import Environment
from .options import DEFAULTS, Cell, make_cells, parser, share_a_process
from .providers import PROVIDERS
from .table import describe_row, table

ENVIRONMENT_LIMIT_S = 120.0
AHEAD = 4  # cells of a process left when the next one is started, which imports for about as long as they take
SAME_CARD = 0.05  # cards of one name differ by more; the ceiling of one card from run to run by less


def main(arguments: Sequence[str] | None = None, worker: tuple[str, ...] = isolate.WORKER) -> int:
    """Runs the sweep that the command line asks for; 0 when at least one row is ok, 130 when interrupted."""
    options = parser().parse_args(arguments)
    console = terminal.console(190)
    run = now()
    try:
        environments = _environments(options.device, _dtypes(options), worker)
        environment = next(iter(environments.values()))
        cells = make_cells(options, environment.device)
        path = options.out or default_path(environment, run, options.resume)
        with outputs.option("--out"):
            path = outputs.prepared(path, f"sweep-{slug(run)}.csv", (".csv",), lambda _: True)  # read_rows judges it
        earlier = read_rows(path) if path.exists() else []  # a file that cannot be read is not appended to either
        rows = _rows_to_resume(earlier, environments, console) if options.resume else []
    except (isolate.WorkerError, SchemaError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt as early:
        return ending.stopped_status(early)
    done = {_row_identity(row) for row in rows}
    todo = [cell for cell in cells if _cell_identity(cell) not in done]
    sweep = Sweep(
        environments=environments,
        device=options.device or environment.device,
        peers=options.peers,
        run=rows[0].run if rows else run,
        path=path,
        limit_s=options.cell_limit_s or DEFAULTS[environment.device].cell_limit_s,
        budget_s=options.budget_s,
        compile_s=options.compile_s,
        repeat_s=options.repeat_s,
        together=share_a_process(options),
        worker=worker,
        console=console,
        rows=rows,
    )
    stop = sweep.measure(todo)
    sweep.report()
    if stop is not None:
        return ending.stopped_status(stop)
    return 0 if any(row.status == "ok" for row in sweep.rows) else 1


def _dtypes(options: argparse.Namespace) -> dict[str, list[str]]:
    """What is to be measured, by kind of device; raises ValueError where there is nothing, whatever the device."""
    if options.out is not None:
        with outputs.option("--out"):
            outputs.checked_name(options.out, (".csv",))
    found, errors = {}, []
    for device in [options.device.partition(":")[0]] if options.device else DEFAULTS:
        try:
            found[device] = list(dict.fromkeys(cell.case.dtype for cell in make_cells(options, device)))
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def default_path(environment: Environment, run: str, resume: bool) -> Path:
    """The machine's newest file to resume, else a new one named by the start of the run."""
    folder = DATA / slug(environment.machine)
    existing = sorted(folder.glob("sweep-*.csv")) if resume else []
    return existing[-1] if existing else folder / f"sweep-{slug(run)}.csv"


@dataclasses.dataclass(kw_only=True)
class Sweep:
    """A run: measures cells, appends each row as it comes, reports. `environments` are by dtype."""

    environments: dict[str, Environment]
    device: str
    peers: dict[str, list[str]]
    run: str
    path: Path
    limit_s: float
    budget_s: float | None
    compile_s: float | None
    repeat_s: float | None
    together: bool
    worker: tuple[str, ...]
    console: Console
    rows: list[Row]

    def measure(self, cells: list[Cell]) -> KeyboardInterrupt | None:
        """Measures every cell for which there is time; returns what stopped it, Ctrl-C or SIGTERM."""
        self._say_where()
        end = None if self.budget_s is None else time.monotonic() + self.budget_s
        left = len(cells)
        with isolate.Spare(self.worker) as spare, terminal.Bar(self.console, "rows", len(cells)) as bar:
            try:
                if self.compile_s is not None and self.device != "cpu":
                    spare.start()
                    self._compile(cells, self.compile_s)
                for group in self._groups(cells):
                    left -= self._measure_group(group, end, bar, spare)
            except KeyboardInterrupt as stop:
                self._say("interrupted: --resume continues this run")
                return stop
        if left:
            self._say(f"{self.budget_s:g} s are over: {left} of {len(cells)} rows left, which --resume measures")
        return None

    def _compile(self, cells: list[Cell], limit_s: float) -> None:
        """Lets the providers compile side by side."""
        parts = precompile.parts(cells, self.device.split(":")[0], cores())
        if not parts:
            return
        tasks = [[self._task(i, cell) for i, cell in enumerate(part)] for part in parts]
        self._say(f"compiling in {len(parts)} processes, for {limit_s:g} s at most")
        start = time.monotonic()
        isolate.side_by_side(tasks, self.device, limit_s, self.worker)
        self._say(f"compiled in {time.monotonic() - start:.0f} s")

    def _task(self, number: int, cell: Cell) -> isolate.Event:
        """A cell as its worker takes it."""
        paths, case = self.peers.get(cell.provider, []), dataclasses.asdict(cell.case)
        return {"id": number, "provider": cell.provider, "paths": paths, "case": case, "repeat_s": self.repeat_s}

    def report(self) -> None:
        """The table of the run, the paths of its CSV and of its figure; with the rows of sweeps beside this one."""
        if not self.rows:
            return
        rows = [row for row in read_rows(self.path) if row.run == self.run]
        self.console.print(table(rows))
        self._say(f"rows:   {self.path}")
        plot = plot_coverage if is_coverage(rows) else plot_sweep
        self._say(f"figure: {plot(rows, self.path.with_suffix('.png'))}")

    def _groups(self, cells: list[Cell]) -> list[list[Cell]]:
        """Cells that share a process as long as it lives: those of one provider and head dim, or all.

        On a CPU each cell is alone, to measure its memory.
        """
        if self.device == "cpu":
            return [[cell] for cell in cells]
        if self.together:
            return [cells]
        return [list(group) for _, group in itertools.groupby(cells, lambda cell: (cell.provider, cell.case.head_dim))]

    def _measure_group(self, group: list[Cell], end: float | None, bar: terminal.Bar, spare: isolate.Spare) -> int:
        """Measures the cells of a group until `end`; how many it did.

        On a GPU the next group's process starts beside the last cells of this one, on a CPU nothing runs beside them.
        """
        if _is_over(end):
            return 0
        count = 0
        tasks = []
        for i, cell in enumerate(group):
            if reason := PROVIDERS[cell.provider].why_not(cell.case, self.device.split(":")[0]):
                count += self._add(cell, {"status": "unsupported", "reason": reason}, bar)
                continue
            tasks.append(self._task(i, cell))

        def on_start(task: isolate.Event) -> None:
            cell = group[task["id"]]
            bar.doing(f"{cell.provider} {cell.case.mode} N={cell.case.queries}")
            if self.device != "cpu" and task in tasks[-AHEAD:]:
                spare.start()

        outcomes = isolate.outcomes(tasks, self.device, self.limit_s, on_start, spare)
        with contextlib.closing(outcomes):
            for task, outcome in outcomes:
                count += self._add(group[task["id"]], outcome, bar)
                if _is_over(end):
                    break
        return count

    def _add(self, cell: Cell, outcome: isolate.Event, bar: terminal.Bar) -> int:
        """Writes one row."""
        row = self._row(cell, outcome)
        append_row(self.path, row)
        self.rows.append(row)
        bar.console.print(describe_row(row), markup=False, highlight=False, soft_wrap=True)
        bar.advance_by(1)
        return 1

    def _row(self, cell: Cell, outcome: isolate.Event) -> Row:
        environment = dataclasses.asdict(self.environments[cell.case.dtype])
        latency_ms, peak_mib = outcome.get("latency_p50_ms"), outcome.get("peak_mib")
        held, least = inputs_mib(cell.case), least_mib(cell.case)
        return Row(
            run=self.run,
            preset=cell.preset,
            provider=cell.provider,
            tflops=None if latency_ms is None else operations(cell.case) / (latency_ms * 1e-3) / 1e12,
            inputs_mib=held,
            least_mib=least,
            peak_ratio=None if peak_mib is None else (held + peak_mib) / least,
            date_utc=now(),
            **(environment | dataclasses.asdict(cell.case) | outcome),
        )

    def _say_where(self) -> None:
        environment = next(iter(self.environments.values()))
        ceilings = ", ".join(f"{dtype} {each.ceiling_tflops:.3g}" for dtype, each in self.environments.items())
        self._say(
            f"{environment.machine}, torch {environment.torch_version}, {environment.threads} threads; "
            f"matrix product {ceilings} TFLOP/s, copy {environment.ceiling_gbs:.3g} GB/s"
        )

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _environments(device: str | None, dtypes: dict[str, list[str]], worker: tuple[str, ...]) -> dict[str, Environment]:
    """By dtype."""
    events = isolate.environments(device, dtypes, ENVIRONMENT_LIMIT_S, worker)
    return {event.pop("dtype"): Environment(**event) for event in events}


def _rows_to_resume(rows: list[Row], environments: dict[str, Environment], console: Console) -> list[Row]:
    """The rows of the last run, if it was made in the same environment."""
    last = [row for row in rows if row.run == rows[-1].run]
    if not last:
        return []
    environment = next(iter(environments.values()))
    names = [field.name for field in dataclasses.fields(Environment) if not field.name.startswith("ceiling")]
    changed = [name for name in names if getattr(last[-1], name) != getattr(environment, name)]
    if environment.device == "cuda" and not _is_same_card(last, environments):
        changed.append("card: the matrix product has another rate")
    if changed:
        console.print(f"the last run had another {', '.join(changed)}: starting a new run", highlight=False)
        return []
    return last


def _is_same_card(rows: list[Row], environments: dict[str, Environment]) -> bool:
    """Cards of one name differ: a ratio between rows of two of them would be none between providers."""
    earlier = {row.dtype: row.ceiling_tflops for row in rows}
    return all(
        abs(environment.ceiling_tflops / earlier[dtype] - 1) < SAME_CARD
        for dtype, environment in environments.items()
        if dtype in earlier
    )


def _row_identity(row: Row) -> tuple[object, ...]:
    return (row.provider, row.preset, *(getattr(row, field.name) for field in dataclasses.fields(Case)))


def _cell_identity(cell: Cell) -> tuple[object, ...]:
    return (cell.provider, cell.preset, *dataclasses.astuple(cell.case))


def _is_over(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end


if __name__ == "__main__":
    sys.exit(ending.run(main))
