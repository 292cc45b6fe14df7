"""Shared by the commands: the choice of a device, where rows go, and what is printed at the start."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from flashjvp_commands import outputs
from reports.environment import DATA, machine, slug


def device_for(asked: str | None) -> str:
    """The device asked for, else the GPU if there is one. On a CPU the kernels are interpreted from here on."""
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, here or in a worker
    return device


def missing(device: torch.device) -> str | None:
    """Why there is no such device, or None."""
    if device.type == "cpu" or (device.index or 0) < torch.cuda.device_count():
        return None
    return f"--device {device}: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs"


def rows_path(out: Path | None, device: str, name: str, columns: Sequence[str]) -> Path:
    """The CSV to write: `out`, or the file `name` in it or in this machine's folder. Raises OutputError."""
    endings = (".csv.gz", ".csv")
    folder = DATA / slug(machine(torch.device(device)))
    return outputs.prepared(out or folder, name, endings, outputs.has_columns(columns))


def announce(console: Console, columns: Mapping[str, str], seed: int, skipped: Sequence[str]) -> None:
    """Prints where a verification runs (`columns` describe its environment), and what it leaves out and why."""
    console.print(
        f"{columns['machine']}, torch {columns['torch_version']}, triton {columns['triton_version']}, "
        f"seed {seed}, commit {columns['commit']}",
        highlight=False,
    )
    for reason in skipped:
        console.print(f"left out: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
