"""`export`: folders for others, read back by every command and by diffusers, with the same network in them."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tvm_ref
from tests.tvm_ref.runs import digits
from tvm_ref import evaluate, export, sample
from tvm_ref.convert import convert
from tvm_ref.data.dataset import DataConfig
from tvm_ref.model.dit import DiT
from tvm_ref.training.checkpoint import ALONE, CheckpointError, named, save
from tvm_ref.training.config import ConfigError, TrainConfig, load_config, save_config
from tvm_ref.training.exported import CONFIG, WEIGHTS, is_exported, without_paths, write_exported
from tvm_ref.training.parallel import world
from tvm_ref.training.trainer import Trainer
from verify.oracles.network import trained

CPU = torch.device("cpu")


def equal(one: DiT, other: DiT) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values()))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return digits(tmp_path / "run", steps=1)


@pytest.fixture
def network(config: TrainConfig) -> DiT:
    return trained(config.model, seed=3, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path, config: TrainConfig, network: DiT) -> Path:
    tensors = named("network", trained(config.model, seed=4, dtype=torch.float32)) | named("ema", network)
    save(tmp_path / "run" / "checkpoints", 1, tensors, config, ALONE)
    export.main([str(tmp_path / "run"), "--out", str(tmp_path / "to" / "hub")])
    return tmp_path / "to" / "hub"


def test_what_is_exported_is_what_was_trained(folder: Path, config: TrainConfig, network: DiT) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # safetensors makes files for their owner alone
    for path in (folder, str(folder), folder / WEIGHTS):
        model, found = tvm_ref.from_pretrained(path)
        assert equal(model, network) and found == without_paths(config) and not model.training
    assert load_file(folder / WEIGHTS).keys() == network.state_dict().keys()
    assert str(folder.parent.parent) not in "".join(path.read_text(errors="replace") for path in folder.iterdir())


def test_raw_weights_and_converted_ones_are_exported(tmp_path: Path, folder: Path, config: TrainConfig) -> None:
    export.main([str(tmp_path / "run"), "--weights", "raw", "--out", str(tmp_path / "raw")])
    assert equal(tvm_ref.from_pretrained(tmp_path / "raw").model, trained(config.model, seed=4, dtype=torch.float32))
    published = trained(config.model, seed=5, dtype=torch.float32)
    (tmp_path / "network.pkl").write_bytes(pickle.dumps(dict(published.state_dict())))
    convert(tmp_path / "network.pkl", tmp_path / "weights.safetensors", str(folder / CONFIG))
    export.main([str(tmp_path / "weights.safetensors"), "--out", str(tmp_path / "again")])
    assert equal(tvm_ref.from_pretrained(tmp_path / "again").model, published)


def test_every_command_takes_the_folder(tmp_path: Path, folder: Path, config: TrainConfig, network: DiT) -> None:
    sample.main([str(folder), "--per-class", "2", "--device", "cpu", "--out", str(tmp_path / "a.png")])
    sample.main([str(tmp_path / "run"), "--per-class", "2", "--device", "cpu", "--out", str(tmp_path / "b.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    evaluate.main(
        [str(folder), "--nfe", "1", "--samples", "64", "--device", "cpu", "--out", str(tmp_path / "quality.json")]
    )
    assert json.loads((tmp_path / "quality.json").read_text())["samples"] == 64
    run = dataclasses.replace(config.run, out=str(tmp_path / "finer"), init=str(folder))
    with world("cpu") as this:
        trainer = Trainer(dataclasses.replace(config, run=run), this, Console(quiet=True))
        assert equal(trainer.state.network, network)
        assert trainer.run()


def test_the_model_card_says_what_the_settings_say(folder: Path, config: TrainConfig, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "| guidance scale in training | 1.5 |" in card and "2 blocks of width 8, 2 heads, patch 4" in card
    assert "| classes | 10 |" in card and "(s - t) w F" in card and "license" not in card.lower()
    other = dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, w_random=(1.0, 2.0), scaled=False),
        data=DataConfig(name="archive", path="/home/someone/latents.zip", latents="imagenet256", num_classes=10),
    )
    write_exported(tmp_path / "other", trained(config.model, seed=3, dtype=torch.float32), other)
    card = (tmp_path / "other" / "README.md").read_text()
    assert "| 1 to 2 |" in card and "| (s - t) F |" in card and "latents, normalised as imagenet256" in card
    assert load_config(tmp_path / "other" / CONFIG).data.path == "latents.zip"


def test_a_folder_that_does_not_fit_is_refused(folder: Path, config: TrainConfig) -> None:
    model = dataclasses.replace(config.model, depth=3)
    save_config(dataclasses.replace(config, model=model), folder / CONFIG)
    with pytest.raises(CheckpointError, match="weights of the network in its settings"):
        tvm_ref.from_pretrained(folder)
    save_config(dataclasses.replace(config, model=dataclasses.replace(model, depth=1000)), folder / CONFIG)
    with pytest.raises(CheckpointError, match="too few bytes"):
        tvm_ref.from_pretrained(folder)
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ConfigError, match="no training configuration"):
        tvm_ref.from_pretrained(folder)
    save_config(config, folder / CONFIG)
    (folder / WEIGHTS).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="safetensors header"):
        tvm_ref.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    assert not is_exported(folder)


def test_nothing_is_replaced_and_nothing_half_done_stays(tmp_path: Path, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for out in (folder, tmp_path / "a.json"):
        with pytest.raises(SystemExit):
            export.main([str(tmp_path / "run"), "--out", str(out)])
    with pytest.raises(SystemExit, match="no checkpoint"):
        export.main([str(tmp_path / "to"), "--out", str(tmp_path / "new")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_diffusers_loads_the_same_network(tmp_path: Path, folder: Path, network: DiT) -> None:
    pytest.importorskip("diffusers")
    from tvm_ref.diffusers_model import TVMTransformer2DModel

    export.main([str(folder), "--layout", "diffusers", "--out", str(tmp_path / "diffusers")])
    model = TVMTransformer2DModel.from_pretrained(tmp_path / "diffusers", use_safetensors=True)
    assert sorted(path.suffix for path in (tmp_path / "diffusers").iterdir()) == [".json", ".safetensors"]
    assert equal(model.dit, network) and (model.config.w, model.config.scaled) == (1.5, True)
    model.save_pretrained(tmp_path / "again")
    assert equal(TVMTransformer2DModel.from_pretrained(tmp_path / "again", use_safetensors=True).dit, network)

    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 10])
    t, s = torch.tensor([1.0, 0.5, 0.3]), torch.tensor([0.0, 0.25, 0.3])
    half = torch.full((3,), 0.5)
    with torch.no_grad():
        F = network(x, t, s, labels, half)
        assert torch.equal(model(x, t, s, labels, w=2.0).sample, 2 * F)
        assert torch.equal(model(x, t, s, labels, w=2.0, return_dict=False)[0], 2 * F)
        no_class = network(x, t, s, torch.full((3,), 10), half)
        assert torch.equal(model(x, t, s, w=2.0).sample, 2 * no_class)
        # One jump from noise is our sampler's, which adds in float64.
        u = model(x, 1.0, 0.0, labels, w=2.0).sample
        assert torch.equal((x.double() - u.double()).float(), one_step(network, x, labels))


def one_step(network: DiT, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from tvm_ref.sampling.sampler import sample

    return sample(network, noise, labels, 2.0, 1, True)


def test_random_guidance_must_be_given(config: TrainConfig, network: DiT) -> None:
    pytest.importorskip("diffusers")
    from tvm_ref.diffusers_model import TVMTransformer2DModel

    model: Any = TVMTransformer2DModel.of(network, dataclasses.replace(config.loss, w_random=(1.0, 2.0), scaled=False))
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="w: expected"):
        model(x, 1.0, 0.0)
    labels, half = torch.full((2,), 10), torch.full((2,), 0.5)
    assert torch.equal(model(x, 1.0, 0.0, w=2.0).sample, network(x, torch.ones(2), torch.zeros(2), labels, half))
