"""`--out PATH` of every command: a file with an ending that the command writes, or a folder for it.

The path is checked, and its folders are made, before the work. A file that is there already is replaced only if it is
one that the command wrote.
"""

import argparse
import contextlib
import gzip
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HELP = "a file (%s), or a folder for it, which is made"
Recognise = Callable[[Path], bool]


class OutputError(ValueError):
    """A path that cannot be written to, or should not be."""


@contextlib.contextmanager
def option(name: str) -> Iterator[None]:
    """An OutputError that is raised within begins with the option whose path it is about."""
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{name}: {error}") from error


def path_with(*endings: str) -> Callable[[str], Path]:
    """The type of `--out`: a path that ends like one of these, or a folder."""

    def parse(text: str) -> Path:
        try:
            if not text.strip():
                raise OutputError("expected a path, got nothing")
            return checked_name(Path(text), endings)
        except OutputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def checked_name(path: Path, endings: Sequence[str]) -> Path:
    """The path. Raises OutputError where it is a file with another ending, or no path at all."""
    if "\0" in str(path):
        raise OutputError("expected a path, got one with a null character")
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that no file system takes
        raise OutputError(f"expected a path that can be written to, got {error}") from error
    names_a_file = path.suffix[1:2].isalpha()  # "run-3.6.0" has no ending, but a number
    if not is_folder and names_a_file and not path.name.endswith(tuple(endings)):
        raise OutputError(f"expected a file that ends with {' or '.join(endings)}, or a folder, got {path}")
    return path


def prepared(given: Path, name: str, endings: Sequence[str], ours: Recognise) -> Path:
    """The file to write, `name` if `given` is a folder. Its folders are made, and it was tried that files can be.

    Raises OutputError, also where such a file exists that `ours` does not recognise.
    """
    checked_name(given, endings)
    path = given if given.name.endswith(tuple(endings)) and not given.is_dir() else given / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() or path.is_symlink():
            if not path.is_file() or not (path.stat().st_size == 0 or ours(path)):
                raise OutputError(f"{path} exists and was not written by this command: give another path")
            if not os.access(path, os.W_OK):
                raise OutputError(f"{path} cannot be written to")
    except OSError as error:
        raise OutputError(f"expected a path that can be written to, got {error}") from error
    return path


def new(path: Path) -> Path:
    """The path of a file or folder to be made. Its parents are made. Raises OutputError if there is something already,
    but for an empty folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise OutputError(f"{path} exists already: give another path")
    except OSError as error:
        raise OutputError(f"expected a path that can be written to, got {error}") from error
    return path


def starts_with(*starts: bytes) -> Recognise:
    """Recognises files by their first bytes, after decompression where they are compressed."""

    def ours(path: Path) -> bool:
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                return file.read(max(map(len, starts))).startswith(starts)
        except (OSError, EOFError):
            return False

    return ours


def has_columns(columns: Sequence[str]) -> Recognise:
    """Recognises CSV files by their header."""
    return starts_with(",".join(columns).encode() + b"\n")


def stopped_name(path: Path) -> Path:
    """Where the rows of a run go that was stopped: "verify-stopped.csv.gz"."""
    name, dot, endings = path.name.partition(".csv")
    return path.with_name(f"{name}-stopped{dot}{endings}")
