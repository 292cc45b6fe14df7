"""Which releases of PyTorch, Triton and Python were tried, which cards, and how: tables of README.md and
`python -m flashjvp`."""

import importlib
import platform
from collections.abc import Sequence
from typing import NamedTuple

import torch

WHOLE, FAST = "whole suite", "fast tier"  # what make test-all and make test run
MEASURED, VERIFIED, PORTABLE = "warp-specialised, measured", "warp-specialised, verified", "portable"


class Row(NamedTuple):
    """A release of PyTorch as PyPI has it for Linux, and the Triton that it brings."""

    torch: str
    triton: str
    python: str
    suite: str  # which tests passed on a CPU, WHOLE or FAST
    gpu: str  # which kernels compute capability 9.0 gets, and whether they were verified or measured, too


TABLE = (
    Row("2.11.0", "3.6.0", "3.11", WHOLE, MEASURED),
    Row("2.12.1", "3.7.1", "3.11", WHOLE, VERIFIED),
    Row("2.13.0", "3.7.1", "3.11", WHOLE, VERIFIED),
    Row("2.14.1", "3.8.0", "3.11", WHOLE, VERIFIED),
    Row("2.15.0", "3.9.0", "3.11", FAST, VERIFIED),
)
HEADER = ("torch", "Triton", "Python", "tests passed on a CPU", "kernels on Hopper GPUs")


COMPILED, RUN = "compiled and emulated, not run", "measured"


class Card(NamedTuple):
    """GPUs of a compute capability ("10.x" are all of 10), and how far the kernels were tried for them."""

    capability: str
    examples: str
    kernels: str
    tried: str  # COMPILED or RUN


CARDS = (
    Card("8.0", "A100, A30", PORTABLE, COMPILED),
    Card("8.6", "RTX 3090, A10", PORTABLE, COMPILED),
    Card("8.9", "RTX 4090, L40S", PORTABLE, COMPILED),
    Card("9.x", "H100, H200", "warp-specialised", RUN),
    Card("10.x", "B200, B300", PORTABLE, COMPILED),
    Card("12.0", "RTX 5090", PORTABLE, COMPILED),
)
HEADER_OF_CARDS = ("capability", "cards", "kernels", "tried")


def tried(capability: tuple[int, int]) -> str | None:
    """How far the kernels were tried on such GPUs: COMPILED, RUN, or None where there are none for them."""
    major, minor = capability
    for card in CARDS:
        if card.capability in (f"{major}.{minor}", f"{major}.x"):
            return card.tried
    return None


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
    """The table of releases as README.md shows it."""
    return _markdown(HEADER, TABLE)


def markdown_of_cards() -> str:
    """The table of cards as docs/reference.md shows it."""
    return _markdown(HEADER_OF_CARDS, CARDS)


def cards_in_words() -> str:
    """The same in README.md."""
    ways = {way: [card.capability for card in CARDS if card.tried == way] for way in (RUN, COMPILED)}
    return "; ".join(f"{', '.join(capabilities)} ({way})" for way, capabilities in ways.items())


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(mine: Row | None) -> str:
    """The table of releases for a terminal, with an arrow at the row `mine`."""
    return _text(HEADER, TABLE, mine)


def text_of_cards() -> str:
    """The table of cards for a terminal."""
    return _text(HEADER_OF_CARDS, CARDS, None)


def _text(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], mine: tuple[str, ...] | None) -> str:
    lines = (header, *rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        ("> " if mine is not None and line is mine else "  ")
        + "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
