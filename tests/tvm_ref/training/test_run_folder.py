"""The folder of a run: one run at a time, the same data, room on the disk, and nothing lost that was finished."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tvm_ref.runs import change, command_line, digits, toy, train
from tvm_ref.data.archive import DatasetError, LatentArchive
from tvm_ref.data.dataset import BatchOrder, DataConfig
from tvm_ref.data.tolerant import Tolerant
from tvm_ref.model.dit import DiTConfig
from tvm_ref.training import checkpoint, preflight
from tvm_ref.training import trainer as trainer_module
from tvm_ref.training.config import ConfigError, EmaConfig, TrainConfig
from tvm_ref.training.parallel import World
from tvm_ref.training.run_lock import RunLock, RunLockedError
from tvm_ref.training.step import NonFiniteError
from tvm_ref.training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))


def latents(folder: Path, count: int = 6, bad: tuple[int, ...] = ()) -> Path:
    """An archive of latents, some of which hold a NaN."""
    folder.mkdir()
    for i in range(count):
        np.save(folder / f"{i}.npy", np.full((8, 4, 4), np.nan if i in bad else 1.0 + i, np.float32))
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.npy", i % 2] for i in range(count)]}))
    return folder


def on_latents(out: Path, data: Path, max_bad: int = 0, **run: object) -> TrainConfig:
    return dataclasses.replace(
        toy(out, **{"batch": 2, "steps": 6, "save_every": 2, **run}),
        model=DiTConfig(image_size=4, channels=4, width=8, depth=1, heads=1, guidance=False),
        data=DataConfig(name="archive", path=str(data), latents="imagenet256", max_bad=max_bad),
    )


def test_a_second_run_in_the_same_folder_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, ALONE)
    with pytest.raises(RunLockedError, match=rf"process {os.getpid()} on "):
        train(toy(tmp_path, steps=1))
    lock.release()
    train(toy(tmp_path, steps=1))


def test_it_is_refused_before_its_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing a large archive takes longer than a user waits."""
    lock = RunLock(tmp_path, ALONE)
    monkeypatch.setattr(trainer_module, "open_dataset", lambda _: pytest.fail("the data were opened"))
    with pytest.raises(RunLockedError):
        train(toy(tmp_path, steps=1))
    lock.release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch; from pathlib import Path; from tvm_ref.training.run_lock import RunLock; "
        "from tvm_ref.training.parallel import World; "
        "lock = RunLock(Path(sys.argv[1]), World(0, 1, torch.device('cpu'))); "
        "print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        before = time.monotonic()
        with pytest.raises(RunLockedError, match=rf"process {child.pid} on "):
            RunLock(tmp_path, ALONE)
        assert time.monotonic() - before < 5
        child.kill()
        child.wait()
    RunLock(tmp_path, ALONE).release()


def test_a_failed_start_gives_the_lock_back(tmp_path: Path) -> None:
    train(toy(tmp_path, steps=1))
    with pytest.raises(ConfigError, match="other settings"):
        train(toy(tmp_path, steps=1, seed=1))
    train(toy(tmp_path, steps=2))


def test_other_data_are_refused_at_resume_unless_asked_for(tmp_path: Path) -> None:
    config = on_latents(tmp_path / "run", latents(tmp_path / "a"), steps=2)
    train(config)
    other = latents(tmp_path / "b", count=5)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(other)))
    with pytest.raises(ConfigError, match=r"other data \(items: 6 before, 5 now; .*names: .*--run.other-data"):
        train(change(changed, steps=4))
    assert "done: 4 steps" in train(change(changed, steps=4, other_data=True))


def test_the_same_data_elsewhere_are_accepted(tmp_path: Path) -> None:
    config = on_latents(tmp_path / "run", latents(tmp_path / "a"), steps=2)
    train(config)
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / "b")))
    assert "done: 3 steps" in train(change(moved, steps=3))


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    config = on_latents(tmp_path / "run", latents(tmp_path / "a"), steps=1)
    data = dataclasses.replace(config.data, num_classes=2)
    config = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, num_classes=2))
    train(config)
    labels = [[f"{i}.npy", 1] for i in range(6)]
    (tmp_path / "a/dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ConfigError, match=r"other data \(labels: "):
        train(change(config, steps=2))


def test_a_bad_item_stops_the_run_with_its_progress_saved(tmp_path: Path) -> None:
    bad = int(BatchOrder(seed=0, size=6).indices(1, 0, 1, 2)[1])  # in the second step
    config = on_latents(tmp_path / "run", latents(tmp_path / "a", bad=(bad,)), steps=50, save_every=100)
    with pytest.raises(DatasetError, match=rf"{bad}\.npy: expected finite .* is saved in .*--data\.max-bad"):
        train(config)
    (path,) = checkpoint.checkpoints(tmp_path / "run/checkpoints")
    assert checkpoint.read_step(path) == 1


def test_bad_items_are_named_once_and_skipped_up_to_the_limit(tmp_path: Path) -> None:
    data = latents(tmp_path / "a", bad=(2, 3))
    printed = train(on_latents(tmp_path / "run", data, max_bad=2, steps=9))
    assert "done: 9 steps" in printed
    assert printed.count("2.npy") == printed.count("3.npy") == 1
    with pytest.raises(DatasetError, match=r"more than data\.max_bad = 1 bad items"):
        train(on_latents(tmp_path / "other", data, max_bad=1, steps=9))


def test_a_run_that_skips_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    data = latents(tmp_path / "a", bad=(1, 2))
    train(on_latents(tmp_path / "whole", data, max_bad=2, steps=6))
    train(on_latents(tmp_path / "parts", data, max_bad=2, steps=3))
    train(on_latents(tmp_path / "parts", data, max_bad=2, steps=6))
    whole, parts = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts"))
    assert whole == parts


def test_all_items_bad_is_an_error_not_a_loop(tmp_path: Path) -> None:
    archive = LatentArchive(latents(tmp_path / "a"), 0, "imagenet256")
    for i in range(1, 6):
        np.save(tmp_path / f"a/{i}.npy", np.full((8, 4, 4), np.nan, np.float32))
    (tmp_path / "a/0.npy").write_bytes(b"")
    said: list[str] = []
    with pytest.raises(DatasetError, match="no good item is left"):
        Tolerant(archive, 10, said.append).get(np.array([0, 4]), torch.Generator())
    assert len(said) == 6


def test_a_fifo_among_the_data_does_not_hang(tmp_path: Path) -> None:
    folder = latents(tmp_path / "a")
    (folder / "3.npy").unlink()
    os.mkfifo(folder / "3.npy")
    archive = LatentArchive(folder, 0, "imagenet256")
    with pytest.raises(DatasetError, match=r"3\.npy: expected a regular file"):
        archive.item(3)


def test_too_little_room_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ConfigError, match=r"free disk space for the next checkpoints .* got 9\.31e-07 GiB"):
        train(toy(tmp_path, steps=1))
    assert not (tmp_path / "metrics.csv").exists()


def test_room_for_snapshots_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(toy(tmp_path, steps=5), ema=EmaConfig(sigma_rels=(0.05, 0.1), every=2))
    trainer = Trainer(config, ALONE, None)  # type: ignore[arg-type]
    expected = preflight._snapshot_bytes(config, trainer.state)
    trainer._lock.release()
    train(config)
    sizes = [path.stat().st_size for path in (tmp_path / "ema").iterdir()]
    assert len(sizes) == 6 and 0 < sum(sizes) - expected < 6 * 16 * 1024  # headers
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ConfigError, match="GiB for all snapshots"):
        train(change(config, out=str(tmp_path / "other")))


def test_a_missing_vae_is_found_before_the_first_step(tmp_path: Path) -> None:
    config = on_latents(tmp_path / "run", latents(tmp_path / "a"), vae=str(tmp_path / "nope"))
    with pytest.raises(ConfigError, match=r"run\.vae: .*nope"):
        train(config)
    assert not (tmp_path / "run/metrics.csv").exists()


@pytest.mark.parametrize("name", ["samples", "tensorboard", "ema", "profile"])
def test_a_file_in_the_place_of_a_folder_is_found_before_the_first_step(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"run\.out: expected a folder .*{name}"):
        train(toy(tmp_path, steps=1))
    assert not (tmp_path / "metrics.csv").exists()


def test_the_room_asked_for_is_what_a_checkpoint_takes(tmp_path: Path) -> None:
    config = digits(tmp_path, steps=1)
    trainer = Trainer(config, ALONE, None)  # type: ignore[arg-type]
    expected = trainer.state.checkpoint_bytes()
    trainer._lock.release()
    train(config)
    (path,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert 0 < size - expected < 64 * 1024  # headers


def test_a_draft_of_a_failed_save_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_config", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        train(toy(tmp_path, steps=1))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_draft_of_a_killed_save_is_removed_at_resume(tmp_path: Path) -> None:
    train(toy(tmp_path, steps=1))
    (tmp_path / "checkpoints/.draft").mkdir()
    train(toy(tmp_path, steps=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_draft_of_the_first_save_is_removed_before_room_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/.draft").mkdir(parents=True)
    trainer = Trainer(toy(tmp_path, steps=1), ALONE, None)  # type: ignore[arg-type]
    assert not list((tmp_path / "checkpoints").iterdir())
    trainer._lock.release()


def test_missing_grids_are_made_at_resume(tmp_path: Path) -> None:
    train(toy(tmp_path, steps=2, sample_every=2))
    grid = tmp_path / "samples/step-00000002-nfe-2.png"
    content = grid.read_bytes()
    grid.unlink()
    train(toy(tmp_path, steps=3, sample_every=2))
    assert grid.read_bytes() == content


def test_files_of_a_file_manager_are_ignored_and_listed(tmp_path: Path) -> None:
    train(toy(tmp_path, steps=1))
    (path,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    (path / ".DS_Store").write_bytes(b"x")
    assert "ignored what does not belong to it: .DS_Store" in train(toy(tmp_path, steps=2))


def test_a_run_is_resumed_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    train(toy(tmp_path / "a", steps=4))
    newest = checkpoint.checkpoints(tmp_path / "a/checkpoints")[-1]
    (newest / "config.json").write_text("{}")
    printed = train(toy(tmp_path / "b", steps=4, resume=str(tmp_path / "a")))
    assert "step-00000002" in printed and "done: 4 steps" in printed
    (tmp_path / "empty").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="no whole checkpoint"):
        train(toy(tmp_path / "c", steps=4, resume=str(tmp_path / "empty")))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer = Trainer(toy(tmp_path, steps=1), ALONE, None)  # type: ignore[arg-type]
    with torch.no_grad():
        trainer.state.average.state_dict()[
            "time.0.weight" if False else next(iter(trainer.state.average.state_dict()))
        ][...] = torch.nan
    with pytest.raises(NonFiniteError, match=r"after step 0 are not finite \(first ema\..*no good ones"):
        trainer._save(None, last=False)
    trainer._lock.release()
    assert not checkpoint.checkpoints(tmp_path / "checkpoints")


def test_a_shorter_run_says_how_long_it_is(tmp_path: Path) -> None:
    train(toy(tmp_path, steps=3))
    assert "done: 3 steps" in train(toy(tmp_path, steps=2))


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_status_of_its_signal(tmp_path: Path, number: signal.Signals) -> None:
    config = toy(tmp_path, steps=10**6, save_every=10**6)
    command = [sys.executable, "-m", "tvm_ref.train", *command_line(tmp_path, steps=config.run.steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        metrics = tmp_path / "metrics.csv"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.1)
        child.send_signal(number)
        printed, _ = child.communicate(timeout=120)
    assert child.returncode == 128 + number, printed
    assert "Traceback" not in printed and f"stopped by {number.name}" in printed
