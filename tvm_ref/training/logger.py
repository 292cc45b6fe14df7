"""Where the numbers of a run go: metrics.csv, TensorBoard, and the terminal."""

import contextlib
import csv
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WINDOW = 20  # steps over which images/s is averaged
QUIET_SECONDS = 10.0  # between lines where the output is no terminal


class Row(NamedTuple):
    """What is known of a step; all but the learning rate of the global batch, before its update.

    step: counted from 1; loss = velocity (terminal-velocity term) + flow (flow-matching term); gradient_norm: before
    clipping.
    """

    step: int
    loss: float
    velocity: float
    flow: float
    gradient_norm: float
    learning_rate: float


class MetricsError(RuntimeError):
    """A metrics file that is none, or that cannot be written."""


class MetricsFile:
    """metrics.csv: a row a step, in full precision, so that equal runs have equal files."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens `path` to go on after `step`: rows of later steps are cut off, atomically."""
        with _named(path):
            kept = _rows_until(path, step) if path.exists() else [",".join(Row._fields) + "\n"]
            draft = path.with_name(f".{path.name}.draft")
            with draft.open("w") as stream:
                stream.writelines(kept)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(path)
            self._stream = path.open("a", newline="")
        self._path, self._writer = path, csv.writer(self._stream, lineterminator="\n")

    def write(self, row: Row) -> None:
        """Appends a row, which the operating system has when this returns."""
        with _named(self._path):
            self._writer.writerow([repr(value) for value in row])
            self._stream.flush()

    def to_disk(self) -> None:
        """Returns when all rows are on the disk."""
        with _named(self._path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        with _named(self._path):
            self._stream.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the operating system become MetricsErrors that name `path`."""
    try:
        yield
    except OSError as error:
        raise MetricsError(f"{path} cannot be written: {error}") from error


def _rows_until(path: Path, step: int) -> list[str]:
    """The header and the complete rows of steps <= `step`."""
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    if header.rstrip("\n") != ",".join(Row._fields):
        raise MetricsError(f"{path} is no metrics file of this program: expected the columns {', '.join(Row._fields)}")
    return [header, *(row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step)]


class Board:
    """TensorBoard's event files in a folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Goes on after `step`: what was written for later steps is hidden."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._folder = folder
        with _named(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Row, images_per_second: float) -> None:
        """Adds the numbers of a step, which a thread writes: an error may be that of an earlier step."""
        more = {"images_per_second": images_per_second, "peak_memory_gib": peak_memory_gib()}
        with _named(self._folder):
            for name, value in (*zip(row._fields[1:], row[1:], strict=True), *more.items()):
                self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Writes what is buffered."""
        with _named(self._folder):
            self._writer.close()


class Live:
    """The progress of a run: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, step: int, steps: int, batch: int) -> None:
        self._console, self._steps, self._batch = console, steps, batch
        self._times: deque[float] = deque([time.perf_counter()], maxlen=WINDOW + 1)
        self._said = 0.0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._bar.start()

    def write(self, row: Row) -> float:
        """Shows the numbers of a step; returns images/s."""
        now = time.perf_counter()
        self._times.append(now)
        speed = self._batch * (len(self._times) - 1) / max(now - self._times[0], sys.float_info.min)
        text = (
            f"{speed:.4g} images/s | velocity {row.velocity:.4g} | flow {row.flow:.4g} | "
            f"gradient {row.gradient_norm:.3g} | {peak_memory_gib():.2f} GiB"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, completed=row.step, description=text)
        elif now - self._said > QUIET_SECONDS or row.step == self._steps:
            self._said = now
            self._console.print(f"step {row.step}/{self._steps} | {text}", highlight=False, soft_wrap=True)
        return speed

    def pause(self) -> None:
        """Leaves the time since the last step out of images/s."""
        self._times.clear()
        self._times.append(time.perf_counter())

    def close(self) -> None:
        """Leaves the last state on the terminal."""
        self._bar.stop()


def peak_memory_gib() -> float:
    """The most memory in use so far: of the GPU's tensors, or of the process where there is no GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
