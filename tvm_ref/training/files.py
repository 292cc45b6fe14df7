"""Writes files that are complete or absent: under another name, flushed to the disk, then renamed."""

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


def to_disk(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
