"""The training loop: starts or resumes a run, trains, logs, samples, saves checkpoints and handles signals."""

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from ..data.dataset import open_dataset
from ..objective.loss import Batch
from . import checkpoint
from .batches import Batches
from .config import ConfigError, TrainConfig, differences, load_config
from .logger import Board, Live, MetricsError, MetricsFile, Row
from .parallel import World
from .report import final_figures, sample_grids
from .state import State
from .step import NonFiniteError, gradient


class Outputs:
    """The loggers of a run, used by the first process: metrics.csv, TensorBoard and the terminal."""

    def __init__(self, config: TrainConfig, step: int, console: Console) -> None:
        """Continues the logs after `step`."""
        out, run = Path(config.run.out), config.run
        self._every = run.log_every
        self.file = MetricsFile(out / "metrics.csv", step)
        self._board = Board(out / "tensorboard", step)
        self.live = Live(console, step, run.steps, run.batch)

    def write(self, row: Row) -> None:
        """Shows a step in the terminal; every run.log_every-th step also goes to metrics.csv and TensorBoard."""
        speed = self.live.write(row)
        if row.step % self._every == 0:
            self.file.write(row)
            self._board.write(row, speed)

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the loggers. If an error ended the run, a failure to write does not replace it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(*([MetricsError] if kind else [])))
            for end in (self.file.close, self._board.close, self.live.close):
                stack.callback(end)


class Trainer:
    """Trains the run that a TrainConfig describes, on the processes of a `World`.

    It writes into the folder config.run.out: checkpoints/, samples/, tensorboard/, metrics.csv and, at the end,
    summary.json.
    """

    def __init__(self, config: TrainConfig, world: World, console: Console) -> None:
        """Opens the data and the folder of the run, and resumes from the newest checkpoint if there is one.

        Raises ConfigError, FileNotFoundError, DatasetError or CheckpointError before anything is written into the
        folder.
        """
        if config.run.evaluate and config.data.name == "archive":
            raise ConfigError(
                "run.evaluate: expected no (--run.no-evaluate) for an archive, whose figures need more files: measure "
                "them afterwards with python -m tvm_ref.evaluate"
            )
        self.config, self.world, self.console = config, world, console
        self._folder = Path(config.run.out) / "checkpoints"
        self.batches = Batches(config, open_dataset(config.data), world)
        if world.first:
            _make(self._folder)
        self.state = State(config, world)
        self._saved: Path | None = None
        self._resume()
        self._signal: signal.Signals | None = None

    def run(self) -> bool:
        """Trains until config.run.steps steps are done (returns True), or until SIGTERM or Ctrl-C (returns False).

        Either way the last state is saved. Raises NonFiniteError, CheckpointError or MetricsError.
        """
        run, state = self.config.run, self.state
        stop = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            outputs = None
            if self.world.first:
                outputs = stack.enter_context(Outputs(self.config, state.step, self.console))
            steps = stack.enter_context(contextlib.closing(self.batches.steps(state.step)))
            while state.step < run.steps and not stop:
                stop = self._step(next(steps), outputs)
                if state.step % run.save_every == 0 or state.step == run.steps or stop:
                    self._save(outputs)
                if state.step % run.sample_every == 0 and state.step < run.steps:
                    self._sample(outputs)
        if state.step < run.steps:
            name = self._signal.name if self._signal else "a signal to another process"
            self._say(f"stopped by {name} after step {state.step}; the same command resumes from {self._saved}")
            return False
        self._sample(None)  # here, so that a run that was killed after its last step gets its grids when resumed
        if run.evaluate and self.world.first and self._saved:
            final_figures(self._saved, self.config, self.world.device, self.console)
        self._say(f"done: {run.steps} steps, {self._saved}")
        return True

    def _step(self, batches: list[Batch], outputs: Outputs | None) -> bool:
        """Makes one optimizer step; returns whether to stop after it."""
        state, device = self.state, self.world.device
        batches = [Batch(*(x.to(device, non_blocking=True) for x in batch)) for batch in batches]
        try:
            outcome = gradient(
                state.objective,
                state.target,
                batches,
                self.world,
                clip=self.config.optim.clip,
                stop=self._signal is not None,
            )
        except NonFiniteError as error:
            if state.step:
                self._save(outputs)
            where = f"the weights before it are in {self._saved}" if state.step else "no step was made before it"
            raise NonFiniteError(f"step {state.step + 1}: {error}. It changed nothing; {where}.") from error
        rate = state.advance()
        if outputs:
            outputs.write(Row(state.step, *outcome[:4], rate))
        return outcome.stop

    def _save(self, outputs: Outputs | None) -> None:
        if outputs:
            outputs.file.to_disk()
        self._saved = checkpoint.save(self._folder, self.state.step, self.state.tensors(), self.config, self.world)
        if outputs:
            outputs.live.pause()

    def _sample(self, outputs: Outputs | None) -> None:
        """Writes sample grids. With sharded weights, every process takes part."""
        if self.world.first or self.config.run.parallel == "fsdp":
            sample_grids(self.state.average, self.config, self.state.step, write=self.world.first)
        if outputs:
            outputs.live.pause()

    def _resume(self) -> None:
        found = checkpoint.checkpoints(self._folder)
        path = Path(self.config.run.resume) if self.config.run.resume else found[-1] if found else None
        if path is None:
            return
        step = checkpoint.read_step(path, self.world)
        changed = differences(load_config(path / checkpoint.CONFIG), self.config)
        if changed:
            raise ConfigError(
                f"{path} was trained with other settings ({'; '.join(changed)}): give the same ones to resume, or "
                "another --run.out to start a new run"
            )
        checkpoint.load(path, self.state.tensors(), self.world)
        self.state.step, self._saved = step, path
        if self.world.first:
            checkpoint.set_aside(self._folder, step)
            checkpoint.remove_old(self._folder, self.config.run.keep)  # in case the run was killed before it did
        self._say(f"resuming from {path}")

    def _say(self, text: str) -> None:
        if self.world.first:
            self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Makes SIGTERM and SIGINT (Ctrl-C) stop the run after the current step."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _make(folder: Path) -> None:
    """Creates a folder and checks that files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"run.out: expected a folder that can be written to, got {error}") from error
