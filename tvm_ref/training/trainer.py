"""The training loop: starts or resumes a run, trains, logs, samples, saves checkpoints and handles signals."""

import contextlib
import itertools
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

from rich.console import Console

from flashjvp_commands.ending import Stopped

from ..data.archive import DatasetError
from ..data.dataset import open_dataset
from ..data.fingerprint import fingerprint
from ..data.tolerant import Tolerant
from ..objective.loss import Batch
from . import checkpoint, checkpoint_folder, files, preflight, snapshots
from .batches import Batches, Steps
from .config import ConfigError, TrainConfig
from .evaluations import Evaluations
from .logger import Row
from .observe import Observations
from .outputs import Outputs
from .parallel import World
from .report import SUMMARY, final_figures, has_grids, sample_grids
from .resuming import check_data, check_place, check_settings, check_starts, given_network, start_from
from .run_lock import RunLock
from .saver import Saver
from .snapshots import save_snapshots
from .state import State
from .step import NonFiniteError, queue_gradient
from .tracing import Tracing
from .yaml_config import NAME, write_yaml


class Trainer:
    """Trains the run that a TrainConfig describes, on the processes of a `World`.

    It writes into the folder config.run.out: checkpoints/, samples/, tensorboard/, config.yaml, metrics.csv and,
    at the end, summary.json; ema/, profile/, norms.csv and loss_by_t.csv, if asked for.
    """

    def __init__(self, config: TrainConfig, world: World, console: Console) -> None:
        """Opens the data and the folder of the run, and resumes from the newest checkpoint if there is one.

        The folder is made and locked before the data are read, until `run` ends. Raises ConfigError,
        FileNotFoundError, DatasetError, RunLockedError or CheckpointError before anything else is written into it; a
        folder that was made for nothing is then removed.
        """
        if config.run.evaluate and config.data.name == "archive":
            raise ConfigError(
                "run.evaluate: expected no (--run.no-evaluate) for an archive, whose figures need more files: measure "
                "them afterwards with python -m tvm_ref.evaluate"
            )
        self.config, self.world, self.console = config, world, console
        self._folder = Path(config.run.out) / "checkpoints"
        check_place(config)
        made = _made(self._folder) if world.first else []
        self._lock = RunLock(Path(config.run.out), world)
        try:
            check_starts(config, self._folder)
            dataset = open_dataset(config.data)
            self._data = fingerprint(dataset)
            self.batches = Batches(config, Tolerant(dataset, config.data.max_bad, self._warn), world)
            if world.first:
                checkpoint_folder.remove_leftovers(self._folder)
            self._saver = Saver(self._folder, config, world, self._data)
            self.signal: signal.Signals | Literal[0] = 0  # what stopped the run
            path = start_from(config, self._folder, world)
            begin_with = path is None and config.run.init
            self.state = State(config, world, given_network(config, world) if begin_with else None)
            self._observations = Observations(config, self.state.network, world)
            if path is not None:
                self._resume(path)
            elif begin_with:
                self._say(f"starting from the weights in {config.run.init}")
            self._evaluations = Evaluations(config, world, self._say)
            preflight.check(config, self._folder, self.state, world)
        except BaseException:
            if world.first:
                self._lock.abandon(made)
            raise

    def run(self) -> bool:
        """Trains until config.run.steps steps are done (returns True), or until SIGTERM or Ctrl-C (returns False).

        A signal during the last step leaves it to the next run to draw samples and evaluate them.

        Either way the last state is saved. Raises NonFiniteError, DatasetError, CheckpointError or MetricsError.
        """
        try:
            if self.world.first:
                write_yaml(self.config, Path(self.config.run.out) / NAME)
                summary = Path(self.config.run.out) / SUMMARY
                if self.state.step < self.config.run.steps and summary.exists():
                    files.set_aside(summary)  # of an earlier end, which is not the one of this run
            return self._finish() if self._train() else False
        finally:
            self._saver.close()
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
            tracing = stack.enter_context(Tracing(run, self._say)) if self.world.first else None
            stop = any(self.world.gather(steps.error() is not None))
            given_up = not stop and self._evaluations.is_missing(state.step) and self._evaluate(outputs)
            stop = stop or given_up
            while state.step < run.steps and not stop:
                stop = self._step(steps, outputs, tracing)
                last = state.step == run.steps or stop
                if state.post_hoc and (state.step % self.config.ema.every == 0 or state.step == run.steps):
                    save_snapshots(state, self.config, self.world)
                if state.step % run.save_every == 0 or last:
                    self._save(outputs, last=last)
                if state.step % run.sample_every == 0 and state.step < run.steps:
                    self._sample(outputs)
                if not stop and self._evaluations.is_due(state.step):
                    stop = given_up = self._evaluate(outputs)
                    if stop and not last:
                        self._save(outputs, last=True)
            if state.step < run.steps or given_up:
                self._stopped(steps)
                return False
            if any(self.world.gather(bool(self.signal))):
                self._say(
                    f"stopped by {self._stopper()} after the last step; the same command draws and evaluates samples"
                )
                return False
            return True

    def _stopped(self, steps: Steps) -> None:
        """Says why the run ended before its last step. Raises DatasetError on the processes whose data ended it."""
        state = self.state
        where = f"what was trained is saved in {self._saver.saved}" if self._saver.saved else "nothing was trained"
        if error := steps.error():
            raise DatasetError(f"step {state.step + 1}: {error}; {where}. --data.max-bad allows bad items") from error
        self._say(
            f"stopped by {self._stopper()} after step {state.step}; the same command resumes from {self._saver.saved}"
        )

    def _stopper(self) -> str:
        """Names what stopped the run, and notes it in `signal`."""
        name = self.signal.name if self.signal else "another process"
        self.signal = self.signal or signal.SIGTERM
        return name

    def _finish(self) -> bool:
        """Writes what belongs to a run that has made its last step."""
        run = self.config.run
        self._sample(None)  # here, so that a run that was killed after its last step gets its grids when resumed
        if run.evaluate and self.world.first and self._saver.saved:
            final_figures(self._saver.saved, self.config, self.world.device, self.console)
        self._say(f"done: {self.state.step} steps, {self._saver.saved}")
        return True

    def _step(self, steps: Steps, outputs: Outputs | None, tracing: Tracing | None) -> bool:
        """Makes one optimizer step; returns whether to stop after it."""
        state, device, number = self.state, self.world.device, self.state.step + 1
        if tracing:
            tracing.before(number)
        self._observations.begin(number)
        batches = [Batch(*(x.to(device, non_blocking=True) for x in batch)) for batch in steps.take()]
        queued = queue_gradient(
            state.objective,
            state.target,
            batches,
            self.world,
            clip=self.config.optim.clip,
            stop=lambda: bool(self.signal) or self._saver.failed or steps.error() is not None,
            observer=self._observations,
            captured=state.captured,
        )
        rate = state.advance(queued.finite)  # before its results are waited for, so that the device goes on
        try:
            outcome = queued.outcome()
        except NonFiniteError as error:
            state.take_back()
            if state.step:
                self._save(outputs, last=True)
            where = f"the weights before it are in {self._saver.saved}" if state.step else "no step was made before it"
            raise NonFiniteError(f"step {number}: {error}. It changed nothing; {where}.") from error
        norms, bins = self._observations.rows(number)
        if outputs:
            outputs.write(Row(number, *outcome[:4], rate), norms, bins)
        if tracing:
            tracing.after(number)
        return outcome.stop

    def _save(self, outputs: Outputs | None, *, last: bool) -> None:
        if outputs:
            outputs.to_disk()
        self._saver.save(self.state.step, self.state.tensors(), self._observations.unwritten(), last=last)
        if outputs:
            outputs.live.pause()

    def _sample(self, outputs: Outputs | None) -> None:
        """Writes sample grids. With sharded weights, every process takes part."""
        if self.world.first or self.config.run.parallel == "fsdp":
            sample_grids(self.state.average, self.config, self.state.step, write=self.world.first)
        if outputs:
            outputs.live.pause()

    def _evaluate(self, outputs: Outputs | None) -> bool:
        """Evaluates the EMA weights; returns whether to stop, because a signal came meanwhile."""
        rows = self._evaluations.evaluate(self.state.average, self.state.step, lambda: bool(self.signal))
        if outputs:
            if rows:
                outputs.evaluated(rows)
            outputs.live.pause()
        return any(self.world.gather(bool(self.signal)))

    def _resume(self, path: Path) -> None:
        step = checkpoint.read_step(path, self.world)
        check_settings(path, self.config)
        check_data(path, self.config, self._data)
        checkpoint.load(path, self.state.tensors(), self.world)
        self.state.step, self._saver.saved = step, path
        self._observations.resume(checkpoint.observed(path))
        if self.world.first:
            checkpoint_folder.set_aside(self._folder, step)
            snapshots.set_aside(Path(self.config.run.out), step)
            checkpoint_folder.remove_old(self._folder, self.config.run.keep)  # in case the run was killed before it did
        self._say(f"resuming from {path}")
        if ignored := checkpoint.stray(path):
            self._say(f"ignored what does not belong to it: {', '.join(ignored)}")
        if step % self.config.run.sample_every == 0 and not has_grids(self.config, step):
            self._sample(None)  # the run was killed between the checkpoint and its grids

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


def _made(folder: Path) -> list[Path]:
    """Creates a folder, and checks that files can be written into it. Returns it and the parents that were missing."""
    try:
        missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"run.out: expected a folder that can be written to, got {error}") from error
    return missing
