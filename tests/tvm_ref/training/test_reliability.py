"""A run that is killed, stopped or refused loses nothing, and repeats the uninterrupted run bit for bit."""

import errno
import io
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from tests.tvm_ref import kills
from tests.tvm_ref.runs import (
    CHILDREN,
    change,
    command_line,
    finish,
    printed_by,
    run_command,
    start,
    toy,
    train,
    train_silently,
)
from tvm_ref.training import checkpoint, step
from tvm_ref.training.checkpoint import CheckpointError, checkpoints, load_model, read_step
from tvm_ref.training.config import ConfigError, TrainConfig
from tvm_ref.training.logger import MetricsError
from tvm_ref.training.parallel import World
from tvm_ref.training.step import NonFiniteError
from tvm_ref.training.trainer import Trainer


def killed_at_a_file_call(config: TrainConfig, counter: Any, last: int) -> None:
    kills.at_a_file_call(counter, last)
    train(config)


def state(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint."""
    newest = checkpoints(out / "checkpoints")[-1]
    read_step(newest)
    return {name: x for file in sorted(newest.glob("*.safetensors")) for name, x in load_file(file).items()}


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path: Path, kills: int) -> None:
    whole, broken = toy(tmp_path / "whole", steps=16), toy(tmp_path / "broken", steps=16)
    calls = CHILDREN.Value("i", 0)
    began = time.monotonic()
    finish(start(killed_at_a_file_call, whole, calls, -1))
    seconds, total = time.monotonic() - began, calls.value
    choice = random.Random()
    for kill in range(kills):
        if kill % 2:  # between two changes of files: nearly all of them write a checkpoint
            calls.value = 0
            child = start(killed_at_a_file_call, broken, calls, choice.randrange(total // 4))
            child.join()
        else:
            child = start(train_silently, broken)
            child.join(choice.uniform(0, seconds / 2))
            child.kill()
            child.join()
        assert child.exitcode in (-signal.SIGKILL, 0)  # 0: it was done before
    finish(start(train_silently, broken))
    assert (tmp_path / "broken/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    one, other = state(tmp_path / "whole"), state(tmp_path / "broken")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    left = [{path.name for path in (tmp_path / run / "checkpoints").iterdir()} for run in ("whole", "broken")]
    assert left[0] == left[1]


def test_what_a_killed_process_had_no_time_to_remove_is_removed_by_the_next(tmp_path: Path) -> None:
    config = toy(tmp_path, steps=8)
    train(config)
    folder = tmp_path / "checkpoints"
    whole = {path.name for path in folder.iterdir()}
    shutil.copytree(checkpoints(folder)[0], folder / "step-00000002")
    shutil.copytree(checkpoints(folder)[0], folder / ".removed-step-00000001")
    train(config)
    assert {path.name for path in folder.iterdir()} == whole


def test_a_signal_in_the_last_step_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation at the end may take minutes. Whoever runs several runs, too, is told of it."""
    config, save = toy(tmp_path, steps=2, save_every=9), Trainer._save

    def signalled(self: Trainer, *arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", signalled)
        said = io.StringIO()
        trainer = Trainer(config, World(0, 1, torch.device("cpu")), Console(file=said, width=200))
        assert trainer.run() is False and trainer.signal == signal.SIGTERM
    assert "stopped by SIGTERM after the last step" in said.getvalue() and not (tmp_path / "samples").exists()
    assert "done: 2 steps" in train(config) and len(list((tmp_path / "samples").iterdir())) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_the_run(tmp_path: Path, number: signal.Signals) -> None:
    config = toy(tmp_path, steps=10**6, save_every=10**6)
    child = start(train_silently, config)
    rows = tmp_path / "metrics.csv"
    while child.is_alive() and not (rows.exists() and rows.read_text().count("\n") > 2):
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, number)
    finish(child)
    step = read_step(checkpoints(tmp_path / "checkpoints")[-1])
    assert rows.read_text().splitlines()[-1].split(",")[0] == str(step)
    train(change(config, steps=step + 1))
    assert rows.read_text().splitlines()[-1].split(",")[0] == str(step + 1)


def with_small_files(config: TrainConfig, most_bytes: int) -> None:
    """Trains with a limit of `most_bytes` for every file, like a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match=r"step-00000004 could not be written: .*File too large.*step-00000002"):
        train(config)


def test_a_full_disk_stops_the_run_with_the_checkpoints_before_it(tmp_path: Path) -> None:
    config = toy(tmp_path)
    train(change(config, steps=2))
    finish(start(with_small_files, config, 4096))
    assert [read_step(path) for path in checkpoints(tmp_path / "checkpoints")] == [2]
    train(config)
    assert [row.split(",")[0] for row in (tmp_path / "metrics.csv").read_text().split()[1:]] == list("12345678")


class FullDisk(io.FileIO):
    """A file on a disk that is full."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on_a_full_disk(arguments: list[str], place: str) -> None:
    """The command, with a disk that is full for every file whose "folder/name" starts with `place`."""
    whole = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        path = Path(os.fsdecode(file) if isinstance(file, bytes | str | os.PathLike) else str(file))
        if not (set(mode) & {"w", "a"} and f"{path.parent.name}/{path.name}".startswith(place)):
            return whole(file, mode, *rest, **options)
        stream = io.BufferedWriter(FullDisk(path, "w"))
        return stream if "b" in mode else io.TextIOWrapper(stream)

    io.open = opened  # pathlib's, with which every file of a checkpoint is opened
    run_command(arguments)


@pytest.mark.parametrize("name", ["shard-", "config.json", "manifest.json"])
def test_no_space_left_ends_the_command_and_leaves_the_checkpoints_before_it(tmp_path: Path, name: str) -> None:
    finish(start(run_command, command_line(tmp_path, steps=2)))
    child = start(on_a_full_disk, command_line(tmp_path, steps=6), f".draft/{name}")
    finish(child, code=1)
    folder = tmp_path / "checkpoints"
    message = f"error: checkpoint {folder}/step-00000004 could not be written: [Errno 28] No space left on device"
    assert f"{message}; the newest one is {folder}/step-00000002." in printed_by(child)
    assert [read_step(path) for path in checkpoints(folder)] == [2]
    load_model(tmp_path, device=torch.device("cpu"))
    finish(start(run_command, command_line(tmp_path, steps=6)))
    assert [row.split(",")[0] for row in (tmp_path / "metrics.csv").read_text().split()[1:]] == list("123456")


def test_no_space_left_for_tensorboard_ends_the_command_and_is_named(tmp_path: Path) -> None:
    child = start(on_a_full_disk, command_line(tmp_path, steps=10**6), "tensorboard/events")
    finish(child, code=1)
    assert f"error: {tmp_path}/tensorboard cannot be written: [Errno 28] No space left" in printed_by(child)
    saved = checkpoints(tmp_path / "checkpoints")
    step = read_step(saved[-1]) if saved else 0
    finish(start(run_command, command_line(tmp_path, steps=step + 2)))
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-1].startswith(f"{step + 2},")


def test_the_error_that_ended_a_run_is_the_one_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, closing the other files fails as well."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "close", full)
    with pytest.raises(MetricsError, match=r"tensorboard cannot be written: .* No space left on device"):
        train(toy(tmp_path, steps=1))  # nothing else went wrong
    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: .*No space left on device"):
        train(toy(tmp_path))


def test_metrics_that_cannot_be_written_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir(parents=True)
    with pytest.raises(MetricsError, match=r"metrics\.csv: expected a regular file"):
        train(toy(tmp_path))


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.out: expected a folder that can be written to"):
        train(toy(tmp_path / "file" / "run"))


def test_other_settings_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    train(toy(tmp_path, steps=3))
    with pytest.raises(ConfigError, match=r"run\.batch: 24 before, 48 now"):
        train(toy(tmp_path, batch=48))
    with pytest.raises(ConfigError, match=r"run\.seed: 0 before, 1 now"):
        train(toy(tmp_path, seed=1))


@pytest.mark.parametrize(
    ("name", "term", "value"),
    [("flow-matching", "flow_term", float("inf")), ("terminal-velocity", "tvm_velocity_term", float("nan"))],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, term: str, value: float
) -> None:
    whole, calls = getattr(step, term), 0

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = whole(*args, **kwargs)
        values, *goal = found if isinstance(found, tuple) else (found,)
        if calls == 4:
            values = values.index_fill(0, torch.tensor(7), value)
        return (values, *goal) if goal else values

    monkeypatch.setattr(step, term, spoiled)
    with pytest.raises(
        NonFiniteError, match=rf"step 4: the {name} term is {value} for 1 of the 24 .* at t = 0\.\d+, s ="
    ):
        train(toy(tmp_path))
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-1].startswith("3,")
    saved = checkpoints(tmp_path / "checkpoints")[-1]
    assert read_step(saved) == 3
    assert all(x.isfinite().all() for x in state(tmp_path).values())
