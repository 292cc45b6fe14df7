"""Writes files that are complete or absent (under another name, flushed to the disk, renamed); sets others aside."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(draft), then makes the draft `path`. If that fails, nothing is left of the draft."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        write(draft)
        to_disk(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def set_aside(path: Path) -> None:
    """Renames a file or folder to aside-NAME, or aside-2-NAME and so on where these are taken."""
    names = (f"aside-{path.name}" if number == 1 else f"aside-{number}-{path.name}" for number in itertools.count(1))
    path.rename(next(place for place in map(path.with_name, names) if not place.exists()))


def to_disk(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
