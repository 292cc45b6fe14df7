"""`python -m bench.sweep`: attention with its JVP, provider beside provider, as a table, a CSV and a figure.

Each provider runs in child processes of its own; an out-of-memory, a crash, a hang or a wrong result is a row, never
the end of the sweep.
"""

import argparse
import dataclasses
import datetime
import itertools
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from reports.environment import DATA, slug
from reports.plot import plot_sweep
from reports.schema import Row, SchemaError, append_row, read_rows

from . import isolate
from .cases import DTYPES, MODES, Case, inputs_mib, least_mib, operations
from .environment import Environment
from .providers import BASELINE, PROVIDERS
from .table import describe_row, table


@dataclass(frozen=True)
class Defaults:
    """Sizes for a device: on a CPU the whole sweep at 8192 tokens ends within minutes on two cores."""

    heads: int
    head_dim: int
    dtype: str
    cell_limit_s: float


DEFAULTS = {
    "cpu": Defaults(heads=1, head_dim=64, dtype="float32", cell_limit_s=120.0),
    "cuda": Defaults(heads=24, head_dim=128, dtype="bfloat16", cell_limit_s=300.0),
}
ENVIRONMENT_LIMIT_S = 120.0


@dataclass(frozen=True)
class Cell:
    """One row to be: a provider on a case."""

    provider: str
    case: Case


def main(arguments: Sequence[str] | None = None, worker: tuple[str, ...] = isolate.WORKER) -> int:
    """Runs the sweep that the command line asks for; 0 when at least one row is ok, 130 when interrupted."""
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    run = _now()
    try:
        measured = isolate.environment(options.device, options.dtype, ENVIRONMENT_LIMIT_S, worker)
        environment = Environment(**measured)
        cells = make_cells(options, environment.device)
        path = options.out or default_path(environment, run, options.resume)
        earlier = read_rows(path) if path.exists() else []  # a file that cannot be read is not appended to either
        rows = _rows_to_resume(earlier, environment, console) if options.resume else []
    except (isolate.WorkerError, SchemaError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    run = rows[0].run if rows else run
    done = {_identity(row) for row in rows}
    todo = [cell for cell in cells if _cell_identity(cell) not in done]
    limit_s = options.cell_limit_s or DEFAULTS[environment.device].cell_limit_s
    sweep = Sweep(environment, options.device or environment.device, run, path, limit_s, worker, console, rows)
    interrupted = sweep.measure(todo)
    sweep.report()
    if interrupted:
        return 130
    return 0 if any(row.status == "ok" for row in sweep.rows) else 1


def parser() -> argparse.ArgumentParser:
    defaults = {device: dataclasses.asdict(default) for device, default in DEFAULTS.items()}

    def by_device(name: str) -> str:
        return f"default {defaults['cpu'][name]} on a CPU, {defaults['cuda'][name]} on a GPU"

    options = argparse.ArgumentParser(
        prog="python -m bench.sweep",
        description="Time and memory of attention with its JVP, provider beside provider: a table, a CSV and a figure.",
    )
    options.add_argument(
        "--seq", type=_sizes, default=[8192], metavar="N,...", help="tokens, queries and keys alike (8192)"
    )
    options.add_argument("--heads", type=_size, metavar="H", help=f"query heads; {by_device('heads')}")
    options.add_argument(
        "--kv-heads", type=_size, metavar="H", help="key and value heads; default as many as query heads"
    )
    options.add_argument("--head-dim", type=_size, metavar="D", help=f"head dimension; {by_device('head_dim')}")
    options.add_argument("--batch", type=_size, default=1, metavar="B", help="batch size (1)")
    options.add_argument("--dtype", choices=DTYPES, help=by_device("dtype"))
    options.add_argument("--causal", action="store_true", help="causal mask")
    options.add_argument(
        "--modes",
        type=_names(MODES),
        default=list(MODES),
        metavar="MODE,...",
        help="fwd: both outputs; fwd+bwd: and the gradients of both outputs in all six inputs (both modes)",
    )
    options.add_argument(
        "--providers",
        type=_names(PROVIDERS),
        default=["flashjvp", BASELINE],
        metavar="NAME,...",
        help=f"out of {', '.join(PROVIDERS)} (flashjvp,{BASELINE})",
    )
    options.add_argument(
        "--device", type=_device, metavar="DEVICE", help="cpu, cuda or cuda:1; default the GPU where there is one"
    )
    options.add_argument(
        "--cell-limit-s", type=float, metavar="S", help=f"time limit of one row in seconds; {by_device('cell_limit_s')}"
    )
    options.add_argument(
        "--out", type=Path, metavar="CSV", help="file to append to; default reports/data/<machine>/sweep-<start>.csv"
    )
    options.add_argument(
        "--resume",
        action="store_true",
        help="continue the last run of --out (by default of the newest file of this machine): skip the rows it has",
    )
    return options


def make_cells(options: argparse.Namespace, device: str) -> list[Cell]:
    """The rows to measure, in order: shape by shape, so that providers are compared close in time."""
    default = DEFAULTS[device]
    heads = options.heads or default.heads
    cases = [
        Case(
            mode=mode,
            batch=options.batch,
            heads=heads,
            kv_heads=options.kv_heads or heads,
            queries=length,
            keys=length,
            head_dim=options.head_dim or default.head_dim,
            dtype=options.dtype or default.dtype,
            causal=options.causal,
        )
        for length in options.seq
        for mode in options.modes
    ]
    by_length = [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.queries)]
    return [Cell(provider, case) for group in by_length for provider in options.providers for case in group]


def default_path(environment: Environment, run: str, resume: bool) -> Path:
    """The machine's newest file to resume, else a new one named by the start of the run."""
    folder = DATA / slug(environment.machine)
    existing = sorted(folder.glob("sweep-*.csv")) if resume else []
    return existing[-1] if existing else folder / f"sweep-{slug(run)}.csv"


class Sweep:
    """A run: measures cells, appends each row as it comes, reports."""

    def __init__(
        self,
        environment: Environment,
        device: str,
        run: str,
        path: Path,
        limit_s: float,
        worker: tuple[str, ...],
        console: Console,
        rows: list[Row],
    ):
        self.environment, self.device, self.run, self.path = environment, device, run, path
        self.limit_s, self.worker, self.console, self.rows = limit_s, worker, console, list(rows)

    def measure(self, cells: list[Cell]) -> bool:
        """Measures every cell; True when interrupted from the keyboard."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.console.print(
            f"{self.environment.machine}, torch {self.environment.torch_version}, {self.environment.threads} threads, "
            f"matrix product {self.environment.ceiling_tflops:.3g} TFLOP/s",
            highlight=False,
        )
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("starting", total=len(cells))
            try:
                for group in self._groups(cells):
                    self._measure_group(group, progress, bar)
            except KeyboardInterrupt:
                self.console.print("interrupted: --resume continues this run")
                return True
            progress.update(bar, description="done")
        return False

    def _groups(self, cells: list[Cell]) -> list[list[Cell]]:
        """Cells that share a process: one provider and shape; on a CPU each cell alone, to measure its memory."""
        if self.environment.device == "cpu":
            return [[cell] for cell in cells]
        return [
            list(group)
            for _, group in itertools.groupby(
                cells, lambda cell: (cell.provider, dataclasses.replace(cell.case, mode="fwd"))
            )
        ]

    def _measure_group(self, group: list[Cell], progress: Progress, bar: TaskID) -> None:
        tasks = [
            {"id": i, "provider": cell.provider, "case": dataclasses.asdict(cell.case)} for i, cell in enumerate(group)
        ]

        def on_start(task: isolate.Event) -> None:
            cell = group[task["id"]]
            progress.update(bar, description=f"{cell.provider} {cell.case.mode} N={cell.case.queries}")

        for task, outcome in isolate.outcomes(tasks, self.device, self.limit_s, on_start, self.worker):
            row = self._row(group[task["id"]], outcome)
            append_row(self.path, row)
            self.rows.append(row)
            progress.console.print(describe_row(row), markup=False, highlight=False, soft_wrap=True)
            progress.advance(bar)

    def _row(self, cell: Cell, outcome: isolate.Event) -> Row:
        columns = {**dataclasses.asdict(self.environment), **dataclasses.asdict(cell.case), **outcome}
        latency_ms, peak_mib = outcome.get("latency_p50_ms"), outcome.get("peak_mib")
        held, least = inputs_mib(cell.case), least_mib(cell.case)
        return Row(
            run=self.run,
            provider=cell.provider,
            tflops=None if latency_ms is None else operations(cell.case) / (latency_ms * 1e-3) / 1e12,
            inputs_mib=held,
            least_mib=least,
            peak_ratio=None if peak_mib is None else (held + peak_mib) / least,
            date_utc=_now(),
            **columns,
        )

    def report(self) -> None:
        """The table of the run, the paths of its CSV and of its figure."""
        if not self.rows:
            return
        self.console.print(table(self.rows))
        self.console.print(f"rows:   {self.path}", highlight=False, soft_wrap=True)
        figure = plot_sweep(self.rows, self.path.with_suffix(".png"))
        self.console.print(f"figure: {figure}", highlight=False, soft_wrap=True)


def _rows_to_resume(rows: list[Row], environment: Environment, console: Console) -> list[Row]:
    """The rows of the last run, if it was made in the same environment."""
    last = [row for row in rows if row.run == rows[-1].run]
    names = [field.name for field in dataclasses.fields(Environment) if field.name != "ceiling_tflops"]
    changed = [name for name in names if last and getattr(last[-1], name) != getattr(environment, name)]
    if changed:
        console.print(f"the last run had another {', '.join(changed)}: starting a new run", highlight=False)
        return []
    return last


def _identity(row: Row) -> tuple[object, ...]:
    return (row.provider, *(getattr(row, field.name) for field in dataclasses.fields(Case)))


def _cell_identity(cell: Cell) -> tuple[object, ...]:
    return (cell.provider, *dataclasses.astuple(cell.case))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _size(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a size: it must be at least 1")
    return value


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


def _device(text: str) -> str:
    if text.split(":")[0] not in DEFAULTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of cpu, cuda, cuda:0, cuda:1, ...")
    return text


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated sweep ends as an interrupted one
    sys.exit(main())
