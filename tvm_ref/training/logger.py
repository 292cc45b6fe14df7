"""Logs the metrics of training steps: CSV files, TensorBoard, and progress in the terminal."""

import contextlib
import csv
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..data.untrusted import UntrustedFileError, open_regular, shown
from .files import write_atomically

WINDOW = 20  # steps over which images/s is averaged
QUIET_SECONDS = 10.0  # between lines if the output is not a terminal


class Row(NamedTuple):
    """Metrics of one step. Loss and gradient are those of the global batch, before the update.

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
    """A metrics file cannot be written, or is not one of this program."""


class MetricsFile:
    """A CSV file such as metrics.csv. Its numbers are in full precision, so that equal runs have equal files."""

    def __init__(self, path: Path, step: int, columns: Sequence[str] = Row._fields) -> None:
        """Opens `path` to continue after `step`, the first column. Rows of later steps are removed, atomically."""
        with _named(path):
            kept = _rows_until(path, step, columns) if path.exists() else [",".join(columns) + "\n"]
            write_atomically(path, lambda draft: draft.write_text("".join(kept)))
            self._stream = path.open("a", newline="")
        self._path, self._writer = path, csv.writer(self._stream, lineterminator="\n")

    def write(self, *rows: Sequence[Any]) -> None:
        """Appends rows and flushes them to the operating system."""
        with _named(self._path):
            self._writer.writerows([value if isinstance(value, str) else repr(value) for value in row] for row in rows)
            self._stream.flush()

    def to_disk(self) -> None:
        """Waits until all rows are on the disk (fsync)."""
        with _named(self._path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        with _named(self._path):
            self._stream.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns OSError, and that of a file that is none, into a MetricsError that names `path`."""
    try:
        yield
    except UntrustedFileError as error:
        raise MetricsError(str(error)) from error
    except OSError as error:
        raise MetricsError(f"{path} cannot be written: {error}") from error


def _rows_until(path: Path, step: int, columns: Sequence[str]) -> list[str]:
    """Returns the header and the complete rows of steps up to `step`."""
    with open_regular(path) as file:
        header, *rows = file.read().decode(errors="replace").splitlines(keepends=True) or [""]
    if header.rstrip("\n") != ",".join(columns):
        raise MetricsError(f"{path} is no metrics file of this program: expected the columns {', '.join(columns)}")
    whole = [row for row in rows if row.endswith("\n")]
    if odd := [row for row in whole if not row.split(",")[0].isdecimal()]:
        raise MetricsError(f"{path} is damaged: expected rows that start with a step, got {shown(odd[0])}")
    return [header, *(row for row in whole if int(row.split(",")[0]) <= step)]


class Board:
    """Writes TensorBoard event files into a folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continues after `step`. Events of later steps are hidden."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._folder = folder
        with _named(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values of a step. A thread writes them, so an error may belong to an earlier step."""
        with _named(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes all buffered events."""
        with _named(self._folder):
            self._writer.close()


class _Bar(Progress):
    """One line with step, total, rate and time left, which 80 columns have room for, and the metrics below it."""

    metrics = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The lines of the bar."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.metrics)


class Live:
    """Shows the progress of a run: a bar in a terminal, otherwise a line every ten seconds."""

    def __init__(self, console: Console, step: int, steps: int, batch: int) -> None:
        self._console, self._steps, self._batch = console, steps, batch
        self._times: deque[float] = deque([time.perf_counter()], maxlen=WINDOW + 1)
        self._said = 0.0
        self._bar = _Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            expand=True,
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._bar.start()

    def write(self, row: Row) -> float:
        """Shows the metrics of a step; returns images/s."""
        now = time.perf_counter()
        self._times.append(now)
        speed = self._batch * (len(self._times) - 1) / max(now - self._times[0], sys.float_info.min)
        rate = f"{speed:.4g} images/s"
        metrics = (
            f"velocity {row.velocity:.4g} | flow {row.flow:.4g} | "
            f"gradient {row.gradient_norm:.3g} | {peak_memory_gib():.2f} GiB"
        )
        if self._console.is_terminal:
            self._bar.metrics = metrics
            self._bar.update(self._task, completed=row.step, description=rate)
        elif now - self._said > QUIET_SECONDS or row.step == self._steps:
            self._said = now
            self._console.print(f"step {row.step}/{self._steps} | {rate} | {metrics}", highlight=False, soft_wrap=True)
        return speed

    def pause(self) -> None:
        """Excludes the time since the last step from images/s."""
        self._times.clear()
        self._times.append(time.perf_counter())

    def close(self) -> None:
        """Stops the bar; its last state stays on the terminal."""
        self._bar.stop()


def peak_memory_gib() -> float:
    """Peak memory so far: of tensors on the GPU, or of the process if there is no GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
