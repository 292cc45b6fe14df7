"""Mutation tests: plants known bugs (faults) in copies of flashjvp and shows that the checks catch every one.

A verification that cannot fail proves nothing. Each fault of fault_list.py is patched into a copy of the package in a
temporary folder. Its check runs on the copy in a process of its own (worker.py), with NaN in fresh memory. It runs on
the GPU if there is one, else in Triton's interpreter. Warp-specialised kernels, and capture and replay, always run in
the emulator on the CPU.

A fault counts as caught when its check runs to the end and a result misses its budget. A crash would not show that the
check sees the fault. A copy without a fault must pass all the same checks.
"""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from flashjvp_commands import arguments as types
from flashjvp_commands import children, outputs, terminal
from flashjvp_commands.ending import stopped_status
from flashjvp_commands.entry import program
from reports.schema import write_rows

from .fault import EMULATED_CHECKS, Fault
from .fault_list import FAULTS
from .markers import MarkerError, mutated

ROOT = Path(__file__).resolve().parents[2]
NO_FAULT = ""


@dataclass(frozen=True)
class Verdict:
    """What a check found with a fault, or with none: the result that lies furthest beyond its budget."""

    fault: str
    stage: str
    file: str
    check: str
    case: str
    quantity: str
    error: float | None
    budget: float | None
    ok: bool
    failure: str


def apply(fault: Fault, package: Path) -> None:
    """Mutates a copy of the package."""
    path = package / fault.file
    try:
        path.write_text(mutated(path.read_text(), fault.marker, fault.statement))
    except MarkerError as error:
        raise MarkerError(f"fault {fault.name!r}, {fault.file}: {error}") from error


def planned(faults: Sequence[Fault]) -> list[tuple[Fault, bool]]:
    """The runs: each check once without a fault (False), then each fault with its check (True)."""
    by_check = {(fault.backend, fault.check, fault.case): fault for fault in faults}
    return [*((fault, False) for fault in by_check.values()), *((fault, True) for fault in faults)]


def run(plan: Sequence[tuple[Fault, bool]], seed: int = 0) -> Generator[Verdict]:
    """The verdicts on a plan, in the order in which they come. Every run has its own copy of the package."""
    source = importlib.util.find_spec("flashjvp")
    assert source is not None and source.origin is not None
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for place, (fault, planted) in enumerate(plan):
            copy = Path(folder, str(place))
            shutil.copytree(Path(source.origin).parent, copy / "flashjvp", ignore=shutil.ignore_patterns("__pycache__"))
            if planted:
                apply(fault, copy / "flashjvp")
            check = {"backend": fault.backend, "check": fault.check, "case": fault.case, "seed": seed}
            jobs.append({"folder": str(copy), **check})
        takes_gpu = [torch.cuda.is_available() and job["check"] not in EMULATED_CHECKS for job in jobs]
        for on_gpu in (True, False):
            here = [place for place, takes in enumerate(takes_gpu) if takes == on_gpu]
            with contextlib.closing(_answers([jobs[place] for place in here], on_gpu)) as answers:
                for answer in answers:
                    fault, planted = plan[here[answer["place"]]]
                    yield _verdict(fault, planted, answer)


def _answers(jobs: list[dict[str, Any]], on_gpu: bool) -> Generator[dict[str, Any]]:
    if not jobs:
        return
    environment = {**os.environ, "TRITON_INTERPRET": "0" if on_gpu else "1"}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # numpy, which interprets the kernels, warns of every NaN in fresh memory
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "verify.faults.worker"]
    pipe = subprocess.PIPE
    with children.child(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        json.dump(jobs, server.stdin)
        server.stdin.close()
        yield from map(json.loads, server.stdout)
        server.wait()
    if server.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {server.returncode}")


def _verdict(fault: Fault, planted: bool, answer: dict[str, Any]) -> Verdict:
    findings = answer.get("findings", [])
    worst: dict[str, Any] = max(findings, key=lambda x: (not x["ok"], share(x["error"], x["budget"])), default={})
    found = worst.get("quantity", ""), worst.get("error"), worst.get("budget")
    ok = bool(findings) and all(x["ok"] for x in findings) != planted
    name = fault.name if planted else NO_FAULT
    return Verdict(name, fault.stage, fault.file, fault.check, fault.case, *found, ok, answer.get("failure", ""))


def share(error: float | None, budget: float | None) -> float:
    """The error over its budget, infinite for NaN; 0 where there is no error."""
    if not error or budget is None:
        return 0.0
    return error / budget if error < math.inf and budget > 0 else math.inf


def table(verdicts: Sequence[Verdict]) -> Table:
    """What caught each fault, and every check that failed without one."""
    out = Table(title="mutation tests")
    for column in ("fault", "verdict", "error", "budget", "furthest off", "check", "on", "file"):
        out.add_column(column, justify="right" if column in ("error", "budget") else "left")
    for v in verdicts:
        if v.fault == NO_FAULT and v.ok:
            continue
        said = "caught" if v.ok else v.failure or ("MISSED" if v.fault else "FAILED")
        numbers = ("" if x is None else f"{x:.2g}" for x in (v.error, v.budget))
        verdict = f"[{'green' if v.ok else 'red'}]{escape(said)}"
        out.add_row(v.fault or "none", verdict, *numbers, escape(v.quantity), v.check, v.case, v.file)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every fault was caught and every check passes without one; 128 plus the signal that stopped it."""
    columns = [field.name for field in fields(Verdict)]
    names = [fault.name for fault in FAULTS]
    parser = types.parser(f"{program('verify')} faults", (__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=types.names_out_of(names), metavar="NAME,...", help="plant these faults alone")
    parser.add_argument("--seed", type=types.seed, default=0, metavar="N", help="seed of the cases' numbers (0)")
    parser.add_argument(
        "--out", type=outputs.path_with(".csv"), metavar="PATH", help=f"for the rows: {outputs.HELP % '.csv'}"
    )
    options = parser.parse_args(arguments)
    try:
        out = options.out and outputs.prepared(options.out, "faults.csv", (".csv",), outputs.has_columns(columns))
    except outputs.OutputError as error:
        parser.error(f"--out: {error}")
    faults = [fault for fault in FAULTS if options.only is None or fault.name in options.only]
    console = terminal.console()
    plan = planned(faults)
    found: list[Verdict] = []
    stop = None
    try:
        with terminal.Bar(console, "runs", len(plan)) as bar, contextlib.closing(run(plan, options.seed)) as verdicts:
            for verdict in verdicts:
                found.append(verdict)
                bar.advance_by(1, f"{verdict.fault or 'no fault'}: {verdict.check}")
    except KeyboardInterrupt as signalled:
        stop, out = signalled, out and outputs.stopped_name(out)
        console.print(f"stopped after {len(found)} of {len(plan)} runs")
    order = {fault.name: place for place, fault in enumerate(faults)}
    found.sort(key=lambda verdict: order.get(verdict.fault, -1))
    console.print(terminal.Fitted(table(found)))
    if out is not None and found:
        write_rows(out, found, columns)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    caught = [verdict.ok for verdict in found if verdict.fault != NO_FAULT]
    sound = [verdict.ok for verdict in found if verdict.fault == NO_FAULT]
    console.print(
        f"{sum(caught)} of {len(caught)} faults caught; {sum(sound)} of {len(sound)} checks pass without a fault"
    )
    return stopped_status(stop) if stop else 0 if all(caught) and all(sound) else 1
