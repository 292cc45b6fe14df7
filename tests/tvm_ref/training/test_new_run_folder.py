"""A run makes and locks its folder before it reads its data, and removes a folder that it made for nothing."""

import dataclasses
import os
from pathlib import Path

import pytest

from tests.tvm_ref.runs import toy, train
from tvm_ref.data.dataset import DataConfig, Dataset, open_dataset
from tvm_ref.training import trainer as trainer_module
from tvm_ref.training.run_lock import RunLockedError


def test_a_second_run_is_refused_while_the_first_one_lists_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def while_the_first_run_lists(data: DataConfig) -> Dataset:
        opened.append(data)
        with pytest.raises(RunLockedError, match=rf"process {os.getpid()} on "):
            train(toy(tmp_path / "runs/new", steps=1))
        return open_dataset(data)

    monkeypatch.setattr(trainer_module, "open_dataset", while_the_first_run_lists)
    assert "done: 1 steps" in train(toy(tmp_path / "runs/new", steps=1))
    assert len(opened) == 1


def test_a_start_that_fails_leaves_no_folder_of_its_own(tmp_path: Path) -> None:
    wrong = dataclasses.replace(toy(tmp_path / "runs/new"), data=DataConfig(name="archive", path=str(tmp_path / "no")))
    with pytest.raises(FileNotFoundError):
        train(wrong)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError):
        train(wrong)
    assert [*tmp_path.rglob("*")] == [tmp_path / "runs"]
    (tmp_path / "runs/new").mkdir()
    (tmp_path / "runs/new/notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError):
        train(wrong)
    assert (tmp_path / "runs/new/notes.txt").read_text() == "mine"
    assert not (tmp_path / "runs/new/checkpoints").exists()
