"""Mutation tests: plants known bugs (faults) in copies of flashjvp and shows that the checks catch every one.

A verification that cannot fail proves nothing. Each fault of fault_list.py is patched into a copy of the package in a
temporary folder. Its check runs on the copy in a process of its own (worker.py), with NaN in fresh memory. It runs on
the GPU if there is one, else in Triton's interpreter. Warp-specialised kernels, and capture and replay, always run in
the emulator on the CPU.

A fault counts as caught when its check runs to the end and a result misses its budget. A crash would not show that the
check sees the fault. A copy without a fault must pass all the same checks.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

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


def run(plan: Sequence[tuple[Fault, bool]], seed: int = 0) -> Iterator[Verdict]:
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
        for emulated in (False, True):
            here = [place for place, job in enumerate(jobs) if (job["check"] in EMULATED_CHECKS) == emulated]
            for answer in _answers([jobs[place] for place in here], on_gpu=not emulated and torch.cuda.is_available()):
                fault, planted = plan[here[answer["place"]]]
                yield _verdict(fault, planted, answer)


def _answers(jobs: list[dict[str, Any]], on_gpu: bool) -> Iterator[dict[str, Any]]:
    if not jobs:
        return
    environment = {**os.environ, "TRITON_INTERPRET": "0" if on_gpu else "1"}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # numpy, which interprets the kernels, warns of every NaN in fresh memory
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "verify.faults.worker"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        json.dump(jobs, server.stdin)
        server.stdin.close()
        yield from map(json.loads, server.stdout)
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
    for column in ("fault", "file", "check", "on", "furthest off"):
        out.add_column(column, overflow="fold")
    for column in ("error", "budget"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("verdict", overflow="fold", min_width=6)
    for v in verdicts:
        if v.fault == NO_FAULT and v.ok:
            continue
        said = "caught" if v.ok else v.failure or ("MISSED" if v.fault else "FAILED")
        numbers = ("" if x is None else f"{x:.2g}" for x in (v.error, v.budget))
        where = (v.fault or "none", v.file, v.check, v.case, escape(v.quantity))
        out.add_row(*where, *numbers, f"[{'green' if v.ok else 'red'}]{escape(said)}")
    return out


def main(argv: Sequence[str]) -> int:
    """0 if every fault was caught and every check passes without one."""
    parser = argparse.ArgumentParser(prog="python -m verify faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="plant this fault alone (may be repeated)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases' numbers")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write faults.csv there")
    options = parser.parse_args(argv)
    names = [fault.name for fault in FAULTS]
    unknown = [name for name in options.only or [] if name not in names]
    if unknown:
        parser.error(f"--only: no fault is called {', '.join(map(repr, unknown))}; there are: {', '.join(names)}")
    faults = [fault for fault in FAULTS if options.only is None or fault.name in options.only]
    console = Console()
    plan = planned(faults)
    found = list(track(run(plan, options.seed), "planting faults", total=len(plan), console=console))
    order = {fault.name: place for place, fault in enumerate(faults)}
    found.sort(key=lambda verdict: order.get(verdict.fault, -1))
    console.print(table(found))
    if options.out is not None:
        write_rows(options.out / "faults.csv", found, [field.name for field in fields(Verdict)])
    planted = [verdict.ok for verdict in found if verdict.fault != NO_FAULT]
    sound = [verdict.ok for verdict in found if verdict.fault == NO_FAULT]
    console.print(
        f"{sum(planted)} of {len(planted)} faults caught; {sum(sound)} of {len(sound)} checks pass without a fault"
    )
    return 0 if all(planted) and all(sound) else 1
