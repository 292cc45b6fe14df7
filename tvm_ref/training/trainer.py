"""The training loop: starts or resumes a run, trains, logs, samples, saves checkpoints and handles signals."""

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from flashjvp_commands.ending import Stopped

from ..data.archive import DatasetError
from ..data.dataset import open_dataset
from ..data.fingerprint import changes, fingerprint, read_fingerprint
from ..data.tolerant import Tolerant
from ..model.dit import DiT
from ..objective.loss import Batch
from . import checkpoint, preflight
from .batches import Batches, Steps
from .config import ConfigError, TrainConfig, differences, load_config
from .converted import check_start, load_model
from .logger import Board, Live, MetricsError, MetricsFile, Row
from .parallel import World
from .report import final_figures, has_grids, sample_grids
from .run_lock import RunLock
from .state import State, initialised
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

        Raises ConfigError, FileNotFoundError, DatasetError, RunLockedError or CheckpointError before anything but the
        lock is written into the folder, which it holds until `run` ends.
        """
        if config.run.evaluate and config.data.name == "archive":
            raise ConfigError(
                "run.evaluate: expected no (--run.no-evaluate) for an archive, whose figures need more files: measure "
                "them afterwards with python -m tvm_ref.evaluate"
            )
        self.config, self.world, self.console = config, world, console
        self._folder = Path(config.run.out) / "checkpoints"
        dataset = open_dataset(config.data)
        self._data = fingerprint(dataset)
        self.batches = Batches(config, Tolerant(dataset, config.data.max_bad, self._warn), world)
        if world.first:
            _make(self._folder)
        self._lock = RunLock(Path(config.run.out), world)
        self._saved: Path | None = None
        self.signal: signal.Signals | Literal[0] = 0  # what stopped the run
        try:
            self.state = State(config, world, self._initial())
            self._resume()
            preflight.check(config, self._folder, self.state, world)
        except BaseException:
            self._lock.release()
            raise

    def run(self) -> bool:
        """Trains until config.run.steps steps are done (returns True), or until SIGTERM or Ctrl-C (returns False).

        Either way the last state is saved. Raises NonFiniteError, DatasetError, CheckpointError or MetricsError.
        """
        try:
            return self._finish() if self._train() else False
        finally:
            self._lock.release()

    def _train(self) -> bool:
        """Makes the steps. Returns whether all are made, or says why not."""
        run, state = self.config.run, self.state
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            outputs = None
            if self.world.first:
                outputs = stack.enter_context(Outputs(self.config, state.step, self.console))
            steps = stack.enter_context(contextlib.closing(self.batches.steps(state.step)))
            stop = any(self.world.gather(steps.error() is not None))
            while state.step < run.steps and not stop:
                stop = self._step(steps, outputs)
                if state.step % run.save_every == 0 or state.step == run.steps or stop:
                    self._save(outputs)
                if state.step % run.sample_every == 0 and state.step < run.steps:
                    self._sample(outputs)
            if state.step < run.steps:
                self._stopped(steps)
            return state.step >= run.steps

    def _stopped(self, steps: Steps) -> None:
        """Says why the run ended before its last step. Raises DatasetError on the processes whose data ended it."""
        state = self.state
        where = f"what was trained is saved in {self._saved}" if self._saved else "nothing was trained"
        if error := steps.error():
            raise DatasetError(f"step {state.step + 1}: {error}; {where}. --data.max-bad allows bad items") from error
        name = self.signal.name if self.signal else "another process"
        self.signal = self.signal or signal.SIGTERM
        self._say(f"stopped by {name} after step {state.step}; the same command resumes from {self._saved}")

    def _finish(self) -> bool:
        """Writes what belongs to a run that has made its last step."""
        run = self.config.run
        self._sample(None)  # here, so that a run that was killed after its last step gets its grids when resumed
        if run.evaluate and self.world.first and self._saved:
            final_figures(self._saved, self.config, self.world.device, self.console)
        self._say(f"done: {self.state.step} steps, {self._saved}")
        return True

    def _step(self, steps: Steps, outputs: Outputs | None) -> bool:
        """Makes one optimizer step; returns whether to stop after it."""
        state, device = self.state, self.world.device
        batches = [Batch(*(x.to(device, non_blocking=True) for x in batch)) for batch in steps.take()]
        try:
            outcome = gradient(
                state.objective,
                state.target,
                batches,
                self.world,
                clip=self.config.optim.clip,
                stop=lambda: bool(self.signal) or steps.error() is not None,
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
        state = self.state
        tensors = state.tensors()
        if bad := [name for part in self.world.gather(_not_finite(tensors)) for name in part]:
            where = f"the last good ones are in {self._saved}" if self._saved else "no good ones were saved"
            raise NonFiniteError(f"the weights after step {state.step} are not finite (first {bad[0]}); {where}")
        self._saved = checkpoint.save(self._folder, state.step, tensors, self.config, self.world, self._data)
        if outputs:
            outputs.live.pause()

    def _sample(self, outputs: Outputs | None) -> None:
        """Writes sample grids. With sharded weights, every process takes part."""
        if self.world.first or self.config.run.parallel == "fsdp":
            sample_grids(self.state.average, self.config, self.state.step, write=self.world.first)
        if outputs:
            outputs.live.pause()

    def _resume(self) -> None:
        path = self._start_from()
        if path is None:
            return
        step = checkpoint.read_step(path, self.world)
        changed = differences(load_config(path / checkpoint.CONFIG), self.config)
        if changed:
            raise ConfigError(
                f"{path} was trained with other settings ({'; '.join(changed)}): give the same ones to resume, or "
                "another --run.out to start a new run"
            )
        self._check_data(path)
        checkpoint.load(path, self.state.tensors(), self.world)
        self.state.step, self._saved = step, path
        if self.world.first:
            checkpoint.set_aside(self._folder, step)
            checkpoint.remove_old(self._folder, self.config.run.keep)  # in case the run was killed before it did
        self._say(f"resuming from {path}")
        if ignored := checkpoint.stray(path):
            self._say(f"ignored what does not belong to it: {', '.join(ignored)}")
        if step % self.config.run.sample_every == 0 and not has_grids(self.config, step):
            self._sample(None)  # the run was killed between the checkpoint and its grids

    def _initial(self) -> DiT | None:
        """The network of run.init, for a run without a checkpoint. Raises ConfigError if it is another network."""
        path = self.config.run.init
        if not path or self._start_from() is not None:
            return None
        start = load_model(Path(path), device=self.world.device)
        check_start(self.config, start, path)
        network = initialised(self.config, self.world)
        network.load_state_dict(start.model.state_dict())
        self._say(f"starting from the weights in {path}")
        return network

    def _start_from(self) -> Path | None:
        """The checkpoint that run.resume names, or the newest whole one of the run that it names, or our newest."""
        resume = Path(self.config.run.resume)
        if self.config.run.resume:
            is_checkpoint = (resume / checkpoint.MANIFEST).is_file() or not resume.is_dir()
            return resume if is_checkpoint else checkpoint.newest_whole(resume, self.world)
        found = checkpoint.checkpoints(self._folder)
        return found[-1] if found else None

    def _check_data(self, path: Path) -> None:
        """Raises ConfigError if the data set is not the one that the checkpoint was trained with."""
        file = path / checkpoint.DATA
        if self.config.run.other_data or not file.is_file():  # checkpoints of earlier versions have none
            return
        if changed := changes(read_fingerprint(file), self._data):
            raise ConfigError(
                f"{path} was trained with other data ({'; '.join(changed)}): give the same data set, or "
                "--run.other-data to go on with this one"
            )

    def _warn(self, text: str) -> None:
        self.console.print(f"process {self.world.rank}: {text}", highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        if self.world.first:
            self.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Makes SIGTERM and SIGINT (Ctrl-C) stop the run after the current step; a second one stops it at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.signal:
                raise Stopped(number)
            self.signal = signal.Signals(number)
            self._say(f"{self.signal.name}: stopping after this step; a second one stops at once, without a checkpoint")

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _not_finite(tensors: checkpoint.Tensors) -> list[str]:
    """Names the tensors of this process that hold NaN or infinity, with one wait for the device."""
    local = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in tensors.items()}
    named = [(name, x) for name, x in local.items() if x.is_floating_point()]
    finite = torch.stack([x.isfinite().all() for _, x in named])
    return [name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good]


def _make(folder: Path) -> None:
    """Creates a folder and checks that files can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"run.out: expected a folder that can be written to, got {error}") from error
