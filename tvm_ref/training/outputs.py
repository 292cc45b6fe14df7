"""The logs of a run, written by its first process: CSV files, TensorBoard, Weights & Biases and the terminal."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from .config import TrainConfig
from .evaluations import FILE, EvaluationRow, kept_until
from .logger import Board, Live, MetricsError, MetricsFile, Row, peak_memory_gib
from .observe import BinRow, NormRow
from .weights_and_biases import WeightsAndBiases


class Dashboard(Protocol):
    """TensorBoard or Weights & Biases."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values of a step."""

    def close(self) -> None:
        """Writes what is left."""


class Outputs:
    """All logs of a run. They are continued where a checkpoint was."""

    def __init__(self, config: TrainConfig, step: int, console: Console) -> None:
        """Continues the logs after `step`."""
        out, run = Path(config.run.out), config.run
        self._every = run.log_every
        self._files: dict[Any, MetricsFile] = {Row: MetricsFile(out / "metrics.csv", step)}
        kinds: dict[str, Any] = {"norms.csv": NormRow, "loss_by_t.csv": BinRow}
        for name, wanted in (("norms.csv", run.log_norms), ("loss_by_t.csv", run.loss_bins)):
            if wanted or (out / name).exists():  # one that is not continued loses later rows, too
                self._files[kinds[name]] = MetricsFile(out / name, step, kinds[name]._fields)
        evaluations = out / FILE
        if run.evaluate_every or evaluations.exists():
            kept = kept_until(evaluations, step)
            self._files[EvaluationRow] = MetricsFile(evaluations, kept, EvaluationRow._fields)
        self._boards: list[Dashboard] = [Board(out / "tensorboard", step)]
        if run.wandb:
            self._boards.append(WeightsAndBiases(config))
        self.live = Live(console, step, run.steps, run.batch)

    def write(self, row: Row, norms: Sequence[NormRow] = (), bins: Sequence[BinRow] = ()) -> None:
        """Shows a step in the terminal; every run.log_every-th step also goes to metrics.csv and the boards.

        norms, bins: what is due in this step.
        """
        speed = self.live.write(row)
        values: dict[str, float] = {}
        if row.step % self._every == 0:
            self._files[Row].write(row)
            values |= row._asdict() | {"images_per_second": speed, "peak_memory_gib": peak_memory_gib()}
            del values["step"]
        if norms:
            self._files[NormRow].write(*norms)
        if bins:
            self._files[BinRow].write(*bins)
        values |= {f"{name}/{row.part}": getattr(row, name) for row in norms for name in NormRow._fields[2:]}
        values |= {f"{name}_by_t/{row.low:.3f}": getattr(row, name) for row in bins for name in ("velocity", "flow")}
        for board in self._boards:
            board.write(row.step, {name: value for name, value in values.items() if value == value})  # without NaN

    def evaluated(self, rows: Sequence[EvaluationRow]) -> None:
        """Writes the figures of an evaluation into evaluations.csv and to the boards."""
        self._files[EvaluationRow].write(*rows)
        values = {f"evaluation/nfe-{row.nfe}/{row.name}" if row.nfe else f"evaluation/{row.name}": row for row in rows}
        for board in self._boards:
            board.write(rows[-1].step, {name: row.value for name, row in values.items()})

    def to_disk(self) -> None:
        """Waits until all rows are on the disk."""
        for file in self._files.values():
            file.to_disk()

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the logs. If an error ended the run, a failure to write does not replace it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(*([MetricsError] if kind else [])))
            files = [file.close for file in self._files.values()]
            for end in (*files, *(board.close for board in self._boards), self.live.close):
                stack.callback(end)
