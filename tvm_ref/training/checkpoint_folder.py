"""The folder of a run's checkpoints: which are there, which are kept, and what a killed process left behind."""

import re
import shutil
from pathlib import Path

from . import files

NAME = re.compile(r"step-\d{8}")
DRAFT = ".draft"  # what is being written


def checkpoints(folder: Path) -> list[Path]:
    """Lists the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def set_aside(folder: Path, step: int) -> None:
    """Renames the checkpoints after `step`, so that a run that went back to `step` does not resume from them."""
    for path in checkpoints(folder):
        if path.name > f"step-{step:08d}":
            files.set_aside(path)


def remove_old(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep`."""
    for old in checkpoints(folder)[:-keep]:
        # Rename it first: a half-removed folder must not look like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".removed-{old.name}")))
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process had no time to: its draft, and what it was removing."""
    for hidden in (DRAFT, ".replaced", *(old.name for old in folder.glob(".removed-*"))):
        shutil.rmtree(folder / hidden, ignore_errors=True)
