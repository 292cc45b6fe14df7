"""`python -m bench.tune`: searches tiles for one architecture and writes a table like the one that the kernels read:
tables.py, or for the kinds tangents and plain hopper_tables.py, the tiles of the warp-specialised kernels.

First every candidate is compiled, for which no GPU is needed; those that do not compile, do not fit into shared memory
or spill much in their loops are skipped. Then the others are timed on the GPU, their results judged by verify's budget
before. A tile in the table gives way only to one that is faster by more than timings differ by chance. Candidates come
in a fixed order, those near the tile in use first, so that a short search is a useful one; --resume continues it. After
a search, `python -m verify codegen` shows whether every option still compiles well.

With --by-count no GPU is needed: of the tiles that compile without spills, the cheapest by count (tile_cost.py).
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from flashjvp.kernels.launch import schedule
from flashjvp.kernels.launch.hopper_tables import Pipeline
from flashjvp_commands import arguments as types
from flashjvp_commands import children, ending, outputs, terminal
from flashjvp_commands.entry import program
from reports.environment import DATA, commit, cores, driver, machine, now, slug, version
from reports.schema import SchemaError

from . import isolate, tile_table
from .tile_cost import cost
from .trials import COLUMNS, Candidate, Trial, candidates, read_trials, winners, write_trials

WORKER = (sys.executable, "-m", "bench.tune_worker")
LIMIT_S = {"compile": 90.0, "time": 90.0}
COMPILE_SHARE = 0.5  # of the time budget, where candidates are also timed
Outcomes = Iterator[tuple[Candidate, dict[str, Any]]]


def main(arguments: Sequence[str] | None = None, worker: tuple[str, ...] = WORKER) -> int:
    """0 with a table or, under --compile-only, a log; 1 if nothing was timed, 2 for a bad input, 130 if stopped."""
    options = parser().parse_args(arguments)
    console = terminal.console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = DATA / slug(machine(device))
    todo = candidates(
        options.arch,
        options.kind,
        options.family or tile_table.families(options.arch, options.kind),
        options.head_dim,
    )
    if not todo:
        console.print(f"no {options.kind} tile of {options.arch} serves these families and head dims", style="red")
        return 2
    if options.by_count and options.kind in tile_table.PIPELINE_KINDS:
        console.print(f"--by-count is for the kinds {', '.join(tile_table.PRODUCTS)}, not {options.kind}", style="red")
        return 2
    try:
        name = f"tune-{options.arch}.csv"
        with outputs.option("--log"):
            log = outputs.prepared(options.log or folder, name, (".csv",), outputs.has_columns(COLUMNS))
        name = f"tiles-{options.arch}-{options.kind}.py"
        with outputs.option("--out"):
            out = outputs.prepared(options.out or folder, name, (".py",), tile_table.is_table)
        search = Search(log, device, options.resume, options.budget_s, worker, console)
    except (SchemaError, FileExistsError, outputs.OutputError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    try:
        with child_environment():
            if options.by_count:
                return written(out, options.kind, cheapest(search, todo), console)
            search.compile(todo, 1.0 if options.compile_only else COMPILE_SHARE)
            console.print(f"log: {log}", highlight=False, soft_wrap=True)
            if options.compile_only:
                return 0
            if device.type != "cuda" or schedule.architecture(device) != options.arch:
                found = schedule.architecture(device) if device.type == "cuda" else "no GPU"
                console.print(f"compiled only: timing needs a GPU of {options.arch}, here is {found}", style="red")
                return 1
            search.time(todo)
    except KeyboardInterrupt as stop:
        console.print(f"stopped: the log is {log}; --resume continues this search", highlight=False, soft_wrap=True)
        return ending.stopped_status(stop)
    tiles = winners([search.trials[candidate] for candidate in todo if candidate in search.trials])
    console.print(terminal.Fitted(summary(search.trials.values(), todo, tiles)))
    return written(out, options.kind, tiles, console)


def written(out: Path, kind: str, tiles: Mapping[tile_table.Entry, tuple[int, ...]], console: Console) -> int:
    """Writes the table with these tiles; 1 if there are none."""
    if not tiles:
        return 1
    tile_table.write(out, kind, tiles)
    console.print(f"tiles: {out}", highlight=False, soft_wrap=True)
    return 0


def cheapest(search: "Search", todo: Sequence[Candidate]) -> dict[tile_table.Entry, tuple[int, ...]]:
    """The tile of each entry that costs least by count, of those that compile without spills at all its head dims.

    Nothing that costs more is compiled.
    """
    found: dict[tile_table.Entry, tuple[int, ...]] = {}
    for entry in dict.fromkeys(candidate.entry for candidate in todo):
        mine: dict[tuple[int, ...], list[Candidate]] = {}
        for candidate in todo:
            if candidate.entry == entry:
                mine.setdefault(candidate.tile, []).append(candidate)
        costs = {tile: cost(*entry, tile) for tile in mine}
        for tile in sorted((tile for tile, x in costs.items() if x is not None), key=lambda x: (costs[x], x)):
            search.compile(mine[tile], 1.0)
            trials = [search.trials.get(candidate) for candidate in mine[tile]]
            if all(trial and trial.status == "compiled" and not trial.loop_spill_share for trial in trials):
                found[entry] = tile
                break
    return found


def parser() -> argparse.ArgumentParser:
    options = types.parser(
        program("bench.tune"),
        "Searches tiles for one architecture: compiles every candidate, times those that compile well, and writes a "
        "table like those in flashjvp/kernels/launch, which --out may name.",
    )
    options.add_argument("--arch", choices=schedule.TABLES, default="sm_90", help="architecture (sm_90)")
    options.add_argument(
        "--kind",
        choices=tile_table.KINDS,
        default="half",
        help="input precision (half), or tangents or plain: of the warp-specialised kernels with or without a JVP",
    )
    families = dict.fromkeys(family for kind in tile_table.KINDS for family in tile_table.families("sm_90", kind))
    options.add_argument(
        "--family", type=types.names_out_of(families), metavar="NAME,...", help=f"out of {', '.join(families)} (all)"
    )
    options.add_argument(
        "--head-dim", type=types.wholes(1, 256), default=[64, 128, 256], metavar="D,...", help="head dims (64,128,256)"
    )
    options.add_argument(
        "--budget-s", type=types.seconds, default=300.0, metavar="S", help="time for the whole search (300)"
    )
    options.add_argument("--compile-only", action="store_true", help="stop after compiling; needs no GPU")
    options.add_argument(
        "--by-count", action="store_true", help="choose by counted operations among what compiles well; needs no GPU"
    )
    options.add_argument("--resume", action="store_true", help="keep what the log has of this version and machine")
    options.add_argument(
        "--log", type=outputs.path_with(".csv"), metavar="PATH",
        help=f"for the trials: {outputs.HELP % '.csv'}; default reports/data/<machine>/tune-<arch>.csv",
    )  # fmt: skip
    options.add_argument(
        "--out", type=outputs.path_with(".py"), metavar="PATH",
        help=f"for the table: {outputs.HELP % '.py'}; default beside the log, tiles-<arch>-<kind>.py",
    )  # fmt: skip
    return options


class Search:
    """What became of every candidate so far, kept in the log as it comes."""

    def __init__(
        self, log: Path, device: torch.device, resume: bool, budget_s: float, worker: tuple[str, ...], console: Console
    ) -> None:
        self.log, self.budget_s, self.worker, self.console = log, budget_s, worker, console
        self.start, self.stopped = time.monotonic(), threading.Event()
        self.environment = {
            "machine": machine(device),
            "driver": driver(device),
            "torch_version": torch.__version__,
            "triton_version": version("triton"),
            "commit": commit(),
        }
        if log.exists() and not resume:
            raise FileExistsError(f"{log} exists: --resume continues it, --log names another")
        earlier = read_trials(log) if log.exists() else []
        self.trials = {trial.candidate: trial for trial in earlier if self._holds(trial)}
        if len(self.trials) < len(earlier):
            console.print(f"{len(earlier) - len(self.trials)} trials were of another version or machine: tried again")

    def compile(self, todo: Sequence[Candidate], share: float) -> None:
        """Compiles what is new, in as many processes as there are cores, within a share of the budget."""
        new = [candidate for candidate in todo if candidate not in self.trials]
        self._record("compiling", len(new), self._compiled(new, self.start + share * self.budget_s))

    def time(self, todo: Sequence[Candidate]) -> None:
        """Times what compiled, one after the other, until the budget is spent."""
        new = [candidate for candidate in todo if self._status(candidate) == "compiled"]
        self._record("timing", len(new), self._outcomes("time", new, self.start + self.budget_s))

    def _compiled(self, new: Sequence[Candidate], deadline: float) -> Outcomes:
        answers: SimpleQueue[tuple[Candidate, dict[str, Any]] | None] = SimpleQueue()

        def serve(part: Sequence[Candidate]) -> None:
            try:
                for answer in self._outcomes("compile", part, deadline):
                    answers.put(answer)
            finally:
                answers.put(None)

        with ThreadPoolExecutor(count := max(1, min(cores(), len(new)))) as threads:
            servers = [threads.submit(serve, new[i::count]) for i in range(count)]
            try:
                for _ in servers:
                    yield from iter(answers.get, None)
            except BaseException:
                children.end_all()
                raise
            finally:
                self.stopped.set()  # when interrupted, no thread starts another candidate
            for server in servers:
                server.result()
        self.stopped.clear()

    def _outcomes(self, stage: str, new: Sequence[Candidate], deadline: float) -> Outcomes:
        """What children report of the candidates, in order, until the deadline."""
        cells = [{"id": i, "stage": stage, **asdict(candidate)} for i, candidate in enumerate(new)]
        if not cells or time.monotonic() > deadline:
            return
        # "cuda", for a limit of main memory is of no use here
        with closing(isolate.outcomes(cells, "cuda", LIMIT_S[stage], lambda _: None, self.worker)) as outcomes:
            for cell, outcome in outcomes:
                yield new[cell["id"]], outcome
                if time.monotonic() > deadline or self.stopped.is_set():
                    return

    def _record(self, what: str, count: int, outcomes: Outcomes) -> None:
        """Keeps every outcome in the log at once."""
        done = 0
        with terminal.Bar(self.console, what, count) as bar:
            for candidate, outcome in outcomes:
                earlier = self.trials.get(candidate)
                known = {name: x for name, x in vars(earlier).items() if x is not None} if earlier else {}
                columns = {**known, "candidate": candidate, **outcome, **self.environment, "date_utc": now()}
                self.trials[candidate] = Trial(**columns)
                write_trials(self.log, self.trials.values())
                bar.advance_by(1)
                done += 1
        if done < count:
            self.console.print(f"{what}: {done} of {count} candidates within the time budget; --resume continues")

    def _holds(self, trial: Trial) -> bool:
        """Whether an earlier trial still says something: what compiled, elsewhere too; times, on this machine only."""
        same = ["triton_version", "commit"]
        if trial.status not in ("compiled", "skipped"):
            same += ["machine", "driver", "torch_version"]
        return all(getattr(trial, name) == self.environment[name] for name in same)

    def _status(self, candidate: Candidate) -> str:
        return self.trials[candidate].status if candidate in self.trials else ""


@contextmanager
def child_environment() -> Iterator[None]:
    """What children see: a Triton cache for both stages, that goes away; kernels are compiled, not interpreted."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


def summary(trials: Any, todo: Sequence[Candidate], tiles: dict[tile_table.Entry, tuple[int, ...]]) -> Table:
    """A line for each entry of the table: the tile in use, the fastest, and how many were tried."""
    known = {trial.candidate: trial for trial in trials}
    pipelines = any(candidate.kind in tile_table.PIPELINE_KINDS for candidate in todo)
    portable, specialised = "query rows x key rows x warps x stages", " x ".join(Pipeline._fields).replace("_", " ")
    sizes = specialised if pipelines else portable
    result = Table(title=f"tiles: {sizes}")
    for name in ("entry", "in use", "ms", "chosen", "ms", "timed", "skipped", "failed", "not tried"):
        result.add_column(name, justify="left" if name in ("entry", "in use", "chosen") else "right")
    for entry in dict.fromkeys(candidate.entry for candidate in todo):
        mine = [candidate for candidate in todo if candidate.entry == entry]
        statuses = [known[candidate].status if candidate in known else "compiled" for candidate in mine]
        counts = [statuses.count("ok"), statuses.count("skipped"), 0, statuses.count("compiled")]
        counts[2] = len(mine) - sum(counts)
        cells: list[str] = []
        for tile in (tuple(tile_table.current(entry)), tiles.get(entry)):
            times = [
                f"{known[x].latency_p50_ms:.3f}"
                for x in mine
                if x.tile == tile and x in known and known[x].status == "ok"
            ]
            cells += ["x".join(map(str, tile)) if tile else "none", " ".join(times)]
        result.add_row(" ".join(map(str, entry)), *cells, *map(str, counts))
    return result


if __name__ == "__main__":
    sys.exit(ending.run(main))
