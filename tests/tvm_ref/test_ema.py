"""`python -m tvm_ref.ema` makes the average that would have been tracked, and files that the other commands take."""

import dataclasses
import errno
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tvm_ref.model.test_power_ema import length, weights_of_steps
from tests.tvm_ref.runs import change, digits, together, toy, train, train_silently
from tvm_ref import ema as command
from tvm_ref.model.dit import DiT
from tvm_ref.model.power_ema import Profile, gamma_of
from tvm_ref.sample import main as sample
from tvm_ref.training import snapshots as module
from tvm_ref.training.checkpoint import CheckpointError, checkpoints, load, named, read_step
from tvm_ref.training.config import ConfigError, EmaConfig, TrainConfig
from tvm_ref.training.converted import load_model
from tvm_ref.training.snapshots import snapshots
from tvm_ref.training.step import NonFiniteError

CPU = torch.device("cpu")


def tracking(config: TrainConfig, **settings: object) -> TrainConfig:
    return dataclasses.replace(config, ema=EmaConfig(**({"sigma_rels": (0.05, 0.1), "every": 2} | settings)))  # type: ignore[arg-type]


def stored(path: Path, word: str, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with this first word."""
    tensors = named(word, DiT(config.model).requires_grad_(False))
    load(path, tensors)
    return {name.removeprefix(f"{word}."): x for name, x in tensors.items()}


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_what_is_made_is_what_would_have_been_tracked(tmp_path: Path, precision: str) -> None:
    steps = 16
    config = tracking(toy(tmp_path, steps=steps, save_every=1, keep=steps), precision=precision)
    train(config)
    weights, _, how = command.average(tmp_path, 0.15)
    goal = Profile(steps, gamma_of(0.15))
    past = [stored(path, "network", config) for path in checkpoints(tmp_path / "checkpoints")]
    unlike = 0
    for name, made in weights.items():
        values = torch.stack([of[name].double() for of in past])
        expected = torch.tensordot(torch.from_numpy(weights_of_steps(goal, steps)), values, dims=1)
        # The profiles' difference (Cauchy and Schwarz), and a rounding of every update and of what is stored.
        largest = values.abs().amax(0)
        rounding = steps * torch.finfo(torch.float32).eps + torch.finfo(getattr(torch, precision)).eps
        bound = how.error * length(goal) * values.square().sum(0).sqrt() + 2 * how.amplification * rounding * largest
        bound = bound + how.amplification * torch.finfo(getattr(torch, precision)).tiny
        assert ((made.double() - expected).abs() <= bound).all(), name
        unlike += int(((past[-1][name].double() - expected).abs() > bound).sum())
    assert unlike > 100  # the bound tells averages apart


def test_the_result_is_sampled_from_and_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tracking(toy(tmp_path / "run", steps=4))
    train(config)
    file = tmp_path / "new/weights.safetensors"
    command.main([str(tmp_path / "run"), "--sigma-rel", "0.1", "--step", "2", "--out", str(file)])
    assert "written: " in capsys.readouterr().out
    loaded = load_model(file, device=CPU)
    assert loaded.config == config
    of_step = load_file(next(one.path for one in snapshots(tmp_path / "run") if one[1:] == (2, 0.1)))
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value.half(), of_step[name])
    sample([str(file), "--out", str(tmp_path / "grid.png"), "--per-class", "64"])
    assert "starting from the weights" in train(toy(tmp_path / "other", steps=1, init=str(file)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{here}/run --sigma-rel 0.1 --step 3", "step: expected one of 2, 4, got 3"),
        ("{here}/none --sigma-rel 0.1", "no snapshots in"),
        ("{here}/run --sigma-rel 0.1 --out {here}/text.safetensors", "not written by this command"),
    ],
)
def test_what_cannot_be_made_is_said(
    tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/ema").mkdir(parents=True)
    for name in ("step-00000002-0.1.safetensors", "step-00000004-0.1.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / "run/ema" / name)
    (tmp_path / "text.safetensors").write_text("someone else's")
    words = words if "--out" in words else f"{words} --out {{here}}/w.safetensors"
    with pytest.raises(SystemExit) as end:
        command.main(words.format(here=tmp_path).split())
    assert re.search(message, capsys.readouterr().err + str(end.value))
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("value", ["0", "nan", "0.3", "x"])
def test_a_width_out_of_range_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["run", "--sigma-rel", value])
    assert end.value.code == 2 and "sigma" in capsys.readouterr().err


def test_snapshots_of_another_network_are_refused(tmp_path: Path) -> None:
    train(tracking(toy(tmp_path, steps=4)))
    path = snapshots(tmp_path)[0].path
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="are of different networks"):
        command.average(tmp_path, 0.1)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="safetensors header"):
        command.average(tmp_path, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_store_what_their_checkpoints_hold(tmp_path: Path, parallel: str) -> None:
    config = tracking(digits(tmp_path, steps=4, parallel=parallel), precision="float32")
    together(2, train_silently, config)
    for path in checkpoints(tmp_path / "checkpoints"):
        of_step = [one for one in snapshots(tmp_path) if one.step == read_step(path)]
        assert [one.sigma_rel for one in of_step] == [0.05, 0.1]
        for number, one in enumerate(of_step):
            expected = stored(path, f"post_hoc_{number}", config)
            found = load_file(one.path)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_that_goes_on_tracks_on(tmp_path: Path) -> None:
    whole, parts = tracking(toy(tmp_path / "whole")), tracking(toy(tmp_path / "parts"))
    train(whole)
    for steps in (3, 8):
        train(change(parts, steps=steps))
    found = {one[1:]: load_file(one.path) for one in snapshots(tmp_path / "parts")}
    for one in snapshots(tmp_path / "whole"):
        expected = load_file(one.path)
        assert all(torch.equal(found[one[1:]][name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"ema\.sigma_rels: \(0\.05, 0\.1\) before, \(0\.05, 0\.2\) now"):
        train(tracking(change(parts, steps=9), sigma_rels=(0.05, 0.2)))
    train(change(parts, resume=str(checkpoints(tmp_path / "parts/checkpoints")[0]), steps=5))
    assert max(one.step for one in snapshots(tmp_path / "parts")) == 5


def test_the_other_weights_are_those_of_a_run_without(tmp_path: Path) -> None:
    train(toy(tmp_path / "without"))
    train(tracking(toy(tmp_path / "with")))
    one, other = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("without", "with"))
    config = toy(tmp_path)
    for word in ("network", "target", "ema"):
        pair = [stored(path, word, config) for path in (one, other)]
        assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_a_snapshot_that_cannot_be_written_or_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(CheckpointError, match=r"snapshot .*step-00000002-0\.05\.safetensors could not be .*No space"):
        train(tracking(toy(tmp_path / "a")))
    assert not list((tmp_path / "a/ema").iterdir())
    monkeypatch.undo()
    whole = torch.Tensor.to

    def overflowing(x: torch.Tensor, *kinds: object, **more: object) -> torch.Tensor:
        found = whole(x, *kinds, **more)  # type: ignore[call-overload]
        return found * math.inf if torch.float16 in kinds else found

    monkeypatch.setattr(torch.Tensor, "to", overflowing)
    with pytest.raises(NonFiniteError, match="expected finite weights in float16"):
        train(tracking(toy(tmp_path / "b")))


@pytest.mark.parametrize("widths", [(0.1, 0.05), (0.1, 0.1), (0.0, 0.1), (0.1, 0.5), (math.nan, 0.1)])
def test_widths_that_make_no_sense_are_refused(widths: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"ema\.sigma_rels: expected"):
        EmaConfig(sigma_rels=widths)
