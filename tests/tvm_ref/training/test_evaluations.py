"""Evaluations while a run trains: they change none of its steps, and a killed run has those of an uninterrupted one."""

import csv
import dataclasses
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tvm_ref.runs import change, launch, together, toy, train, train_silently
from tests.tvm_ref.test_evaluate_together import Detector, pictures
from tvm_ref import evaluate as command
from tvm_ref.data.dataset import DataConfig
from tvm_ref.evaluate import EvaluateConfig, evaluate
from tvm_ref.model.dit import DiTConfig
from tvm_ref.training.checkpoint import checkpoints, load_model
from tvm_ref.training.config import ConfigError, TrainConfig
from tvm_ref.training.evaluations import random_states_kept

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
CPU = torch.device("cpu")


def on_images(folder: Path, name: str, **run: Any) -> TrainConfig:
    """A run on RGB images that is judged by a stand-in for Inception."""
    if not (folder / "images").exists():
        pictures(folder / "images", 9)
        torch.jit.script(Detector()).save(str(folder / "detector.pt"))
    files = {"inception": str(folder / "detector.pt"), "reference_images": str(folder / "images")}
    defaults = {"batch": 4, "steps": 6, "evaluate_every": 3, "evaluate_samples": 10}
    return dataclasses.replace(
        toy(folder / name, **(defaults | files | run)),
        model=DiTConfig(
            image_size=4, channels=3, patch=2, width=8, depth=1, heads=1, guidance=False, attention_backend="reference"
        ),
        data=DataConfig(name="archive", path=str(folder / "images")),
    )


def rows(out: Path) -> list[list[str]]:
    with (out / "evaluations.csv").open() as stream:
        return list(csv.reader(stream))[1:]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints(out / "checkpoints")[-1]
    return {name: x for file in sorted(newest.glob("*.safetensors")) for name, x in load_file(file).items()}


def same(one: Path, other: Path) -> None:
    """Asserts that two runs have the same metrics, evaluations (if both have any) and checkpoints, bit for bit."""
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    files = [run / "evaluations.csv" for run in (one, other)]
    if all(file.exists() for file in files):
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", [pytest.param("toy", marks=pytest.mark.slow), "images"])
def test_an_evaluation_changes_no_step(kind: str, tmp_path: Path) -> None:
    make = on_images if kind == "images" else lambda folder, name, **run: toy(folder / name, **run)
    printed = train(make(tmp_path, "with", steps=6, evaluate_every=2, evaluate_samples=10))
    train(make(tmp_path, "without", steps=6, evaluate_every=0))
    same(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without/evaluations.csv").exists()
    assert {row[0] for row in rows(tmp_path / "with")} == {"2", "4", "6"}
    assert "step 2: evaluated in " in printed and " s; 1 NFE: " in printed  # it says what it cost


def test_global_random_states_are_kept() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(KeyboardInterrupt), random_states_kept(CPU):
        torch.rand(3), np.random.rand(3), random.random()
        raise KeyboardInterrupt
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_figures_are_those_of_evaluate_and_go_to_tensorboard(tmp_path: Path) -> None:
    config = on_images(tmp_path, "run", steps=3)
    train(config)
    loaded = load_model(tmp_path / "run", device=CPU)
    files = {"inception": tmp_path / "detector.pt", "reference_images": tmp_path / "images"}
    expected = evaluate(loaded.model, config, EvaluateConfig(checkpoint=tmp_path, samples=10, device="cpu", **files))
    found = {(int(nfe), name): float(value) for _, nfe, name, value in rows(tmp_path / "run")}
    assert found == {
        **{(nfe, name): x for nfe, figures in expected.by_nfe.items() for name, x in figures.items()},
        **{(0, name): x for name, x in expected.context.items()}, (0, "samples"): 10.0,
    }  # fmt: skip
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("evaluation/nfe-1/fid")] == [3]
    shown = board.Scalars("evaluation/nfe-2/recall")[0].value
    assert shown == np.float32(expected.by_nfe[2]["recall"])


@pytest.mark.slow
def test_two_processes_killed_at_any_point_give_the_same_run(tmp_path: Path) -> None:
    whole, broken = (on_images(tmp_path, name, steps=9, save_every=2) for name in ("whole", "broken"))
    together(2, train_silently, whole)  # it also loads what children need
    began = time.monotonic()
    together(2, train_silently, dataclasses.replace(whole, run=dataclasses.replace(whole.run, out=str(tmp_path / "t"))))
    seconds, choice = time.monotonic() - began, random.Random()
    for _ in range(20):
        children = launch(2, train_silently, broken)
        time.sleep(choice.uniform(0, seconds))
        for child in children:
            child.kill()
        for child in children:
            child.join()
    together(2, train_silently, broken)
    same(tmp_path / "whole", tmp_path / "broken")
    assert {row[0] for row in rows(tmp_path / "broken")} == {"3", "6", "9"}
    assert not list((tmp_path / "broken").glob("*unfinished*"))


def test_what_was_written_of_an_evaluation_before_a_kill_is_written_anew(tmp_path: Path) -> None:
    config = toy(tmp_path / "run", steps=4, evaluate_every=2, evaluate_samples=10)
    train(config)
    content = (tmp_path / "run/evaluations.csv").read_text()
    for kept in (content[:-1], content[: content.rindex("\n4,") - 3], content[: content.index("\n4,") + 1]):
        (tmp_path / "run/evaluations.csv").write_text(kept)
        train(config)
        assert (tmp_path / "run/evaluations.csv").read_text() == content


@pytest.mark.slow
def test_sharded_weights_are_evaluated_by_all_processes(tmp_path: Path) -> None:
    for kind in ("ddp", "fsdp"):
        together(2, train_silently, on_images(tmp_path, kind, parallel=kind))
        together(2, train_silently, toy(tmp_path / f"toy-{kind}", parallel=kind, evaluate_every=4, evaluate_samples=10))
    for one, other in (("ddp", "fsdp"), ("toy-ddp", "toy-fsdp")):
        assert [row[:3] for row in rows(tmp_path / one)] == [row[:3] for row in rows(tmp_path / other)]


def test_a_signal_gives_an_evaluation_up_and_saves_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = on_images(tmp_path, "run", save_every=100)
    original = command.evaluate_images

    def asked_to_stop(*given: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate_images", asked_to_stop)
        printed = train(config)
    assert "stopped by SIGTERM after step 3" in printed and rows(tmp_path / "run") == []
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-00000003"]
    train(config)
    train(change(config, out=str(tmp_path / "whole")))
    same(tmp_path / "run", tmp_path / "whole")


def test_a_failed_evaluation_is_said_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("expected finite images, got some values that are not")

    config = on_images(tmp_path, "run", steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate_together", fails)
        printed = train(config)
    assert "step 3: the evaluation failed, and training goes on: expected finite images" in printed
    assert "done: 3 steps" in printed and rows(tmp_path / "run") == []
    train(config)
    assert rows(tmp_path / "run")[-1] == ["3", "0", "samples", "10"]


def test_what_cannot_be_evaluated_is_found_before_the_first_step(tmp_path: Path) -> None:
    config = on_images(tmp_path, "run")
    for run, message in (
        ({"inception": ""}, r"fetch https://.*--run\.NAME"),
        ({"inception": "nowhere.pt"}, r"no Inception weights at nowhere\.pt"),
        ({"reference_images": ""}, "FID needs --reference"),
        ({"evaluate_samples": 3}, "need 4 images, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(change(config, **run))
    with pytest.raises(ConfigError, match=r"run\.inception: expected nothing for data 'eight_gaussians'"):
        train(toy(tmp_path / "run", inception="x.pt"))
    assert not (tmp_path / "run/metrics.csv").exists()


def test_a_single_process_of_many_can_compute_a_frechet_distance(tmp_path: Path) -> None:
    """torchmetrics would wait for the others, who compute none."""
    together(2, frechet_in_the_first, tmp_path / "done")
    assert (tmp_path / "done").exists()


def frechet_in_the_first(path: Path) -> None:
    from tvm_ref.quality.metrics import frechet_distance
    from tvm_ref.training.parallel import world

    with world("cpu") as this:
        if this.first:
            assert frechet_distance(torch.eye(3), torch.eye(3)) < 1
            path.touch()
