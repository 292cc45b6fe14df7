"""Types of arguments that commands share, each with the range that is allowed, and help that fits the terminal."""

import argparse
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from . import ending

T = TypeVar("T")
WIDEST = 100
GIVEN_TWICE = "given twice: expected it once; a list has commas, as in a,b"
SEEDS = 2**32
MOST = 10**9  # a larger number is a slip, and would end in an error that names nothing


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. An option with a value may be given once; argparse takes the last one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the command line, with exit status 2."""
        self.exit(
            ending.UNUSABLE,
            f"error: {ending.printable(' '.join(message.split()))} ({self.prog} --help lists the options)\n",
        )

    def print_help(self, file: Any = None) -> None:
        """Prints the help. Raises OSError where it cannot be written, which argparse itself hides."""
        (file or sys.stdout).write(self.format_help())


class _Once(argparse.Action):
    """Stores the value of an option, but not a second one."""

    _filled: argparse.Namespace | None = None

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option is not None and self._filled is namespace:
            raise argparse.ArgumentError(self, GIVEN_TWICE)
        self._filled = namespace
        setattr(namespace, self.dest, values)


def parser(prog: str, description: str, epilog: str = "") -> Parser:
    """A parser whose help is wrapped at the terminal's width; indented lines of the texts stay as they are."""
    return Parser(
        prog=prog, description=_filled(description), epilog=_filled(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip


def _filled(text: str) -> str:
    width = min(shutil.get_terminal_size().columns, WIDEST) - 2
    parts = textwrap.dedent(text).strip().split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in parts)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a whole number in [least, most]; `MOST` is the most that any may be."""
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    most = MOST if most is None else most

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value > most == MOST:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {MOST}, got {text!r}")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number {span}, got {text!r}")
        return value

    return parse


seed = whole(0, SEEDS - 1)


def wholes(least: int, most: int | None = None) -> Callable[[str], list[int]]:
    """The type of a list of whole numbers, each once, such as "1,2,4"."""
    one = whole(least, most)
    return lambda text: _each_once([one(part) for part in text.split(",")])


def _each_once(values: list[T]) -> list[T]:
    if again := [value for place, value in enumerate(values) if value in values[:place]]:
        raise argparse.ArgumentTypeError(f"expected each once, got {again[0]!r} twice")
    return values


def seconds(text: str) -> float:
    """A finite time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of seconds above 0, got {text!r}")
    return value


def names_out_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of a list of known names, each once, such as "a,b"."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return _each_once(found)

    return parse


def a_device_name(text: str) -> str | None:
    """`text`, if it names a device of a kind that is supported, else None."""
    return text if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text) else None


def a_device(text: str) -> str:
    """The type of a device's name."""
    if a_device_name(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of cpu, cuda, cuda:0, cuda:1, ...")
    return text
