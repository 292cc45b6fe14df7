"""Checkpoints: complete, verified, free of pickles, and equal for every number of processes."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from flashjvp_commands.ending import Stopped
from tests.tvm_ref.runs import change, digits, toy, train
from tvm_ref.model.dit import DiT
from tvm_ref.training.checkpoint import CheckpointError, checkpoints, load, load_model, named, read_step, save
from tvm_ref.training.config import TrainConfig
from tvm_ref.training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))
CPU = torch.device("cpu")


def some() -> dict[str, torch.Tensor]:
    return {
        "network.a": torch.randn(5, 3),
        "network.empty": torch.zeros(0, 2),
        "optimizer.step": torch.tensor(7.0),
        "ema.count": torch.tensor([1, 2**40]),
    }


def write(folder: Path, *steps: int, keep: int = 3) -> TrainConfig:
    config = change(toy(folder), keep=keep)
    for step in steps:
        save(folder, step, some(), config, ALONE)
    return config


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    tensors = some()
    path = save(tmp_path, 12, tensors, toy(tmp_path), ALONE)
    assert path.name == "step-00000012"
    assert read_step(path) == 12
    found = {name: torch.full_like(x, 3) for name, x in tensors.items()}
    load(path, found)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 10, 300, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000300"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_step_that_is_there_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    tensors = some()
    path = save(tmp_path, 2, tensors, toy(tmp_path), ALONE)
    found = {name: torch.zeros_like(x) for name, x in tensors.items()}
    load(path, found)
    assert torch.equal(found["network.a"], tensors["network.a"])
    assert len(list(tmp_path.iterdir())) == 2


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, 1, 2)
    file = data.draw(st.sampled_from(sorted((folder / "step-00000002").iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_step(folder / "step-00000002")
    assert f"{folder / 'step-00000002'} is damaged" in str(error.value)
    assert file.name in str(error.value)
    assert f"--run.resume {folder / 'step-00000001'}" in str(error.value)


def test_missing_and_added_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    shard = next(path.glob("shard-*"))
    shutil.copy(shard, path / "shard-00009-model-00001-of-00001.safetensors")
    shard.unlink()
    with pytest.raises(CheckpointError) as error:
        read_step(path)
    assert f"{shard.name} is missing" in str(error.value)
    assert "shard-00009-model-00001-of-00001.safetensors was added" in str(error.value)
    assert "there is no intact checkpoint before it" in str(error.value)


def test_a_signal_while_tensors_are_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP makes an error of its own of it."""
    write(tmp_path, 1)
    stop = Stopped(signal.SIGINT)

    def stopped(*_: object, **__: object) -> None:
        raise CheckpointException("write", {0: (stop, traceback.StackSummary())})

    monkeypatch.setattr(dcp, "save", stopped)
    with pytest.raises(Stopped) as caught:
        write(tmp_path, 2)
    assert caught.value is stop
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_only_a_whole_checkpoint_is_offered(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"--run\.resume \S+step-00000001\)"):
        read_step(tmp_path / "step-00000003")


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["shard", "config.json", "manifest.json", ".metadata"])
def test_no_pickle_is_executed(tmp_path: Path, name: str) -> None:
    config = toy(tmp_path, steps=2)
    train(config)
    path = checkpoints(tmp_path / "checkpoints")[-1]
    poison = pickle.dumps(Hostile(tmp_path / "executed"))
    file = next(path.glob("shard-*")) if name == "shard" else path / name
    file.write_bytes(poison)
    if name == "shard":  # with a manifest that vouches for it
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"][file.name] = {"bytes": len(poison), "sha256": hashlib.sha256(poison).hexdigest()}
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}, indent=2) + "\n")
    for use in (lambda: load_model(path, device=CPU), lambda: train(config)):
        with pytest.raises(CheckpointError, match=path.name):
            use()
    pickle.loads(poison)
    assert (tmp_path / "executed").exists()  # the file was hostile indeed


def test_tensors_that_are_not_there_are_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    with pytest.raises(CheckpointError, match=r"does not hold the tensors of this run: .*network\.b"):
        load(path, {"network.b": torch.zeros(5, 3)})
    with pytest.raises(CheckpointError, match=r"does not hold the tensors of this run: .*network\.a"):
        load(path, {"network.a": torch.zeros(3, 5)})


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_trained_network_is_loaded_for_evaluation(tmp_path: Path, weights: Any) -> None:
    config = digits(tmp_path, steps=3)
    train(config)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    for path in (newest, tmp_path):
        model, found = load_model(path, device=CPU, weights=weights)
        assert found == config
        expected = DiT(config.model)
        load(newest, named("ema" if weights == "ema" else "network", expected))
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), expected.parameters(), strict=True))
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_stray_file_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000009").write_text("mine")
    (tmp_path / "step-00000001-copy-2").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    write(tmp_path, 2, keep=1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-00000002", "step-00000009", "step-00000001-copy-2"}


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        load_model(tmp_path, device=CPU)
