"""Checkpoints written in a thread: the same bits, training goes on meanwhile, and no failure is lost."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tvm_ref.runs import change, digits, together, toy, train, train_silently
from tvm_ref.model.dit import DiT
from tvm_ref.training import checkpoint
from tvm_ref.training.checkpoint import CheckpointError, checkpoints, load, named, read_step
from tvm_ref.training.config import TrainConfig
from tvm_ref.training.saver import _Thread

PATIENCE_SECONDS = 120


def rows(out: Path) -> list[str]:
    return (out / "metrics.csv").read_text().splitlines()[1:]


def test_a_run_that_saves_in_a_thread_is_the_same(tmp_path: Path) -> None:
    train(toy(tmp_path / "at-once"))
    train(toy(tmp_path / "later", async_checkpoints=True, steps=5))
    train(toy(tmp_path / "later", async_checkpoints=True))
    assert rows(tmp_path / "later") == rows(tmp_path / "at-once")
    one, other = (checkpoints(tmp_path / name / "checkpoints") for name in ("at-once", "later"))
    assert [read_step(path) for path in other] == [5, 6, 8] and [read_step(path) for path in one] == [4, 6, 8]
    for before, after in zip(one[1:], other[1:], strict=True):
        for file in before.glob("*.safetensors"):
            expected, found = load_file(file), load_file(after / file.name)
            assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is finished only once two more steps are made, and yet holds the state of its own step."""
    whole = checkpoint._write_tensors

    def slow(draft: Path, *rest: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not checkpoints(draft.parent):
            for _ in range(PATIENCE_SECONDS * 100):
                if len(rows(tmp_path / "later")) >= 5:
                    break
                threading.Event().wait(0.01)
            else:
                raise TimeoutError("training waited for the checkpoint")
        whole(draft, *rest)

    monkeypatch.setattr(checkpoint, "_write_tensors", slow)
    train(toy(tmp_path / "later", save_every=3, steps=5, async_checkpoints=True))
    train(toy(tmp_path / "at-once", save_every=3, steps=5))
    first, expected = (checkpoints(tmp_path / name / "checkpoints")[0] for name in ("later", "at-once"))
    assert read_step(first) == read_step(expected) == 3
    for file in expected.glob("*.safetensors"):
        pair = load_file(file), load_file(first / file.name)
        assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def failing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint that a thread writes fails."""
    whole, failed = checkpoint._write_tensors, threading.Event()

    def failing(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not failed.is_set():
            failed.set()
            raise OSError(28, "No space left on device")
        whole(*arguments)

    monkeypatch.setattr(checkpoint, "_write_tensors", failing)


def test_a_failure_of_the_thread_ends_the_run_with_its_last_state_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_once(monkeypatch)
    config = toy(tmp_path, steps=10**6, save_every=100, async_checkpoints=True)
    with pytest.raises(CheckpointError, match=r"step-00000100 could not .*No space.* trained until step \d+ is saved"):
        train(config)
    (saved,) = checkpoints(tmp_path / "checkpoints")
    step = read_step(saved)
    assert 100 <= step < 200 and len(rows(tmp_path)) == step  # it did not wait for the next checkpoint
    assert not (tmp_path / "checkpoints/.draft").exists()
    train(change(config, steps=step + 1))


def two_that_fail(config: TrainConfig) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="could not be written"):
        failing_once(patch)
        train(config)


@pytest.mark.slow
def test_a_failure_of_a_thread_ends_all_processes_after_the_same_step(tmp_path: Path) -> None:
    together(2, two_that_fail, digits(tmp_path, steps=10**6, save_every=3, async_checkpoints=True))
    (saved,) = checkpoints(tmp_path / "checkpoints")
    assert len(rows(tmp_path)) == read_step(saved)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_save_in_threads_what_they_save_at_once(tmp_path: Path, parallel: str) -> None:
    settings = {"steps": 4, "parallel": parallel, "keep": 1}
    together(2, train_silently, digits(tmp_path / "at-once", **settings, save_every=4))
    together(2, save_four_in_a_thread, digits(tmp_path / "later", **settings, save_every=4, async_checkpoints=True))
    one, other = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("at-once", "later"))
    assert read_step(one) == read_step(other) == 4
    for word in ("network", "target", "ema"):
        pair = []
        for path in (one, other):
            tensors = named(word, DiT(digits(tmp_path).model).requires_grad_(False))
            load(path, tensors)
            pair.append(tensors)
        assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (one, other)]
    assert abs(sizes[0] - sizes[1]) < 64 * 1024  # headers: every tensor is there once
    written = {path.name[:11] for path in other.glob("shard-*")}
    assert written == {"shard-00001", "shard-00002"}
    train(change(digits(tmp_path / "later", **settings), steps=5))


def save_four_in_a_thread(config: TrainConfig) -> None:
    """Trains five steps, of which the fourth is saved in a thread, and takes the last checkpoint away."""
    train(change(config, steps=5, keep=2))
    last = checkpoints(Path(config.run.out) / "checkpoints")[-1]
    if last.name.endswith("5"):
        last.rename(last.with_name("last"))


def test_the_copies_are_kept_and_overwritten(tmp_path: Path) -> None:
    from tvm_ref.training.checkpoint import ALONE

    thread = _Thread(ALONE)
    seen: list[tuple[int, float]] = []

    def note(copies: dict[str, torch.Tensor], _: Any) -> Path:
        seen.append((copies["a.x"].data_ptr(), copies["a.x"].sum().item()))
        return tmp_path

    for value in (1.0, 2.0):
        source = torch.full((3,), value)
        thread.start({"a.x": source}, note)
        assert thread.result() == tmp_path and thread.result() is None
        assert seen[-1][0] != source.data_ptr()
    thread.close()
    assert seen[0][0] == seen[1][0] and [total for _, total in seen] == [3.0, 6.0]
