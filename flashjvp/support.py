"""Which releases of PyTorch, Triton and Python were tried, and how: the table of README.md and `python -m flashjvp`."""

import importlib
import platform
from collections.abc import Sequence
from typing import NamedTuple

import torch

WHOLE, NOT_TRIED = "whole suite", "not tried"  # the whole suite is what make test-all runs
MEASURED, VERIFIED, PORTABLE = "warp-specialised, measured", "warp-specialised, verified", "portable"


class Row(NamedTuple):
    """A release of PyTorch as PyPI has it for Linux, and the Triton that it brings."""

    torch: str
    triton: str
    python: str
    suite: str  # which tests passed on a CPU, WHOLE or NOT_TRIED
    gpu: str  # which kernels compute capability 9.0 gets, and whether they were verified or measured, too


TABLE = (
    Row("2.11.0", "3.6.0", "3.11", WHOLE, MEASURED),
    Row("2.12.1", "3.7.1", "3.11", WHOLE, VERIFIED),
    Row("2.13.0", "3.7.1", "3.11", WHOLE, VERIFIED),
    Row("2.14.1", "3.8.0", "3.11", WHOLE, VERIFIED),
    Row("2.15.0", "3.9.0", "3.11", NOT_TRIED, VERIFIED),
)
HEADER = ("torch", "Triton", "Python", "tests passed on a CPU", "kernels on Hopper GPUs")


class Versions(NamedTuple):
    """What is installed; `triton` is None where there is none."""

    torch: str
    triton: str | None
    python: str
    flashjvp: str


def installed() -> Versions:
    """The versions of this process."""
    from . import __version__

    try:
        triton: str | None = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    return Versions(torch.__version__, triton, platform.python_version(), __version__)


def row_of(versions: Versions) -> Row | None:
    """The row with this release of PyTorch, of whatever build, with its own Triton; None if it was not tried."""
    release = versions.torch.split("+")[0]
    pairs = (row for row in TABLE if (row.torch, row.triton) == (release, versions.triton))
    return next(pairs, None)


def markdown() -> str:
    """The table as README.md shows it."""
    lines = [HEADER, ("---",) * len(HEADER), *TABLE]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(mine: Row | None) -> str:
    """The table for a terminal, with an arrow at the row `mine`."""
    lines: Sequence[tuple[str, ...]] = (HEADER, *TABLE)
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        ("> " if mine is not None and line is mine else "  ")
        + "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
