"""`python -m bench measure-card`, or `make measure-this-gpu`: all that makes the kernels measured on a card, in one
command that can be stopped and run again, into one folder to send in.

It verifies every case, searches tiles for every input precision, and sweeps a few shapes. The folder holds CSVs, the
tables of tiles that were found, and what the card and the versions are. No line of it names the machine, the user or a
path.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from flashjvp.kernels.launch import schedule
from flashjvp_commands import arguments as types
from flashjvp_commands import children, ending, terminal
from flashjvp_commands.entry import program
from reports.environment import ROOT, commit, driver, machine, now, slug, version

ARCHIVED = (".csv", ".py", ".json", ".txt")
PACKAGES = ("torch", "triton", "flashjvp")


class Step(NamedTuple):
    """A command of ours, done when it ended with one of these statuses: a failing case is a finding, too."""

    name: str
    command: tuple[str, ...]
    statuses: tuple[int, ...] = (ending.HELD,)


def steps(folder: Path, arch: str, budget_s: float) -> list[Step]:
    """What is run, in order. Each writes into the folder and continues what it left there."""
    found = [
        Step(
            f"tune-{kind}",
            (
                "bench.tune", "--arch", arch, "--kind", kind, "--budget-s", f"{budget_s:g}", "--resume",
                "--log", str(folder / f"tune-{kind}.csv"), "--out", str(folder / f"tiles-{kind}.py"),
            ),
        )
        for kind in ("half", "tf32", "ieee")
    ]  # fmt: skip
    judged = (ending.HELD, ending.FAILED)
    verify = "verify", "--device", "cuda", "--backend", "triton", "--out", str(folder / "verify.csv")
    sweep = (
        "bench.sweep", "--preset", "card", "--device", "cuda", "--resume", "--budget-s", f"{budget_s:g}",
        "--out", str(folder / "sweep.csv"),
    )  # fmt: skip
    return [Step("verify", verify, judged), Step("sweep", sweep, judged), *found]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every step was done, 1 if one failed, 2 without a GPU that has tiles, 128 + signal if stopped."""
    options = types.parser(program("bench.measure_card"), (__doc__ or "").split("\n\n")[0])
    options.add_argument("--out", type=Path, metavar="FOLDER", help="default: card-<its name>; one there is continued")
    options.add_argument(
        "--budget-s", type=types.seconds, default=900.0, metavar="S", help="time of each search and the sweep (900)"
    )
    chosen = options.parse_args(arguments)
    console = terminal.console()
    device = torch.device("cuda", 0)
    if reason := why_not(device):
        options.error(reason)
    folder = (chosen.out or Path(f"card-{slug(machine(device))}")).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        options.error(f"--out: expected a folder, got {error}")
    write_card(folder / "card.json", device)
    try:
        failed = [step.name for step in steps(folder, schedule.architecture(device), chosen.budget_s)
                  if not done(step, folder, console)]  # fmt: skip
    except KeyboardInterrupt as stop:
        console.print("stopped: the same command goes on from here")
        return ending.stopped_status(stop)
    finally:
        for path in sorted(folder.iterdir()):
            if path.suffix in ARCHIVED:
                scrub(path)
    said = f"failed: {', '.join(failed)}; the same command tries them again" if failed else "complete: send it in"
    console.print(f"{folder} is {said}", markup=False, highlight=False, soft_wrap=True)
    return ending.FAILED if failed else ending.HELD


def why_not(device: torch.device) -> str:
    """Why there is nothing to measure here, or an empty string."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU (nvidia-smi shows whether the driver does)"
    if schedule.architecture(device) not in schedule.TABLES:
        return f"there are no tiles for {machine(device)}, only for {', '.join(schedule.TABLES)}"
    return ""


def done(step: Step, folder: Path, console: Console) -> bool:
    """Runs a step unless an earlier run did; whether it is done now. What it prints is kept beside its rows."""
    mark = folder / f"{step.name}.txt"
    if mark.exists():
        console.print(f"{step.name}: done before")
        return True
    console.print(f"{step.name}: python -m {' '.join(step.command)}", markup=False, highlight=False, soft_wrap=True)
    printed: list[str] = []
    command = [sys.executable, "-m", *step.command]
    with children.child(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            console.print(line.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
            printed.append(line)
        status = process.wait()
    if status not in step.statuses:
        console.print(f"{step.name}: ended with status {status}", style="red")
        return False
    mark.write_text(without_names("".join(printed)))
    return True


def write_card(path: Path, device: torch.device) -> None:
    """What the card and the versions are; never what the machine is called."""
    properties = torch.cuda.get_device_properties(device)
    known = {
        "card": machine(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory >> 20,
        "shared_bytes_a_block": getattr(properties, "shared_memory_per_block_optin", None),
        "driver": driver(device),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
        "date_utc": now(),
    }
    path.write_text(json.dumps(known, indent=2) + "\n")


def scrub(path: Path) -> None:
    """Takes what names the machine, its user or its folders out of a file."""
    text = path.read_text(errors="replace")
    if (clean := without_names(text)) != text:
        path.write_text(clean)


def without_names(text: str) -> str:
    """The text without paths of this machine, its name and its user's."""
    folders = [str(ROOT), sys.prefix, sys.base_prefix, str(Path.home()), tempfile.gettempdir(), os.getcwd()]
    for folder in sorted(set(folders) - {"/", ""}, key=len, reverse=True):
        text = text.replace(folder, "...")
    names = {socket.gethostname(), os.environ.get("USER", ""), os.environ.get("LOGNAME", "")}
    for name in sorted((x for x in names if len(x) > 3 and x not in ("root", "localhost")), key=len, reverse=True):
        text = text.replace(name, "...")
    return text


if __name__ == "__main__":
    sys.exit(ending.run(main))
