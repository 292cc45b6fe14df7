"""Shared by the commands: types of arguments, the choice of a device, and what is printed at the start."""

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from rich.console import Console


def a_device(text: str) -> str:
    """`text`, if it names a device of a kind that is supported."""
    name, _, index = text.partition(":")
    if name not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of cpu, cuda, cuda:0, cuda:1, ...")
    return text


def names_out_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of an argument that is a list of known names, such as "a,b"."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return found

    return parse


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


def announce(console: Console, columns: Mapping[str, str], seed: int, skipped: Sequence[str]) -> None:
    """Prints where a verification runs (`columns` describe its environment), and what it leaves out and why."""
    console.print(
        f"{columns['machine']}, torch {columns['torch_version']}, triton {columns['triton_version']}, "
        f"seed {seed}, commit {columns['commit']}",
        highlight=False,
    )
    for reason in skipped:
        console.print(f"left out: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
