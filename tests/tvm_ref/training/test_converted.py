"""Converted weights are sampled from and trained on, with the settings of their run."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from tests.tvm_ref.runs import digits
from tvm_ref.convert import convert
from tvm_ref.model.dit import DiT
from tvm_ref.training.checkpoint import ALONE, CheckpointError, save
from tvm_ref.training.config import ConfigError, TrainConfig, save_config
from tvm_ref.training.converted import as_metadata, load_model
from tvm_ref.training.parallel import world
from tvm_ref.training.trainer import Trainer
from verify.oracles.network import trained

CPU = torch.device("cpu")


def converted(folder: Path, config: TrainConfig) -> tuple[Path, DiT]:
    network = trained(config.model, seed=3, dtype=torch.float32)
    (folder / "network.pkl").write_bytes(pickle.dumps(dict(network.state_dict())))
    save_config(config, folder / "config.json")
    convert(folder / "network.pkl", folder / "weights.safetensors", str(folder / "config.json"))
    return folder / "weights.safetensors", network


def test_converted_weights_come_with_their_settings(tmp_path: Path) -> None:
    path, network = converted(tmp_path, config := digits(tmp_path / "run"))
    loaded = load_model(path, device=CPU)
    assert loaded.config == config
    assert all(map(torch.equal, loaded.model.state_dict().values(), network.state_dict().values()))


def test_weights_without_settings_or_with_others_are_refused(tmp_path: Path) -> None:
    path, network = converted(tmp_path, digits(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"model.image_size: expected 8 .*, got 32 \(imagenet256-w2\)"):
        convert(tmp_path / "network.pkl", path, "imagenet256-w2")
    save_file(network.state_dict(), path)
    with pytest.raises(CheckpointError, match="holds no settings"):
        load_model(path, device=CPU)


def test_a_run_starts_from_given_weights_once(tmp_path: Path) -> None:
    path, network = converted(tmp_path, digits(tmp_path / "run"))
    config = digits(tmp_path / "run", steps=1, init=str(path))
    with world("cpu") as this:
        trainer = Trainer(config, this, Console(quiet=True))
        for module in (trainer.state.network, trainer.state.target, trainer.state.average):
            assert all(map(torch.equal, module.state_dict().values(), network.state_dict().values()))
        assert trainer.run()
        path.unlink()  # a resumed run does not need it
        assert Trainer(dataclasses.replace(config), this, Console(quiet=True)).run()
        fine = digits(tmp_path / "finer", steps=1, init=str(tmp_path / "run"))
        assert Trainer(fine, this, Console(quiet=True)).run()


def test_a_run_of_another_network_is_refused(tmp_path: Path) -> None:
    path, _ = converted(tmp_path, digits(tmp_path / "run"))
    config = digits(tmp_path / "other", steps=1, init=str(path))
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=3))
    unscaled = dataclasses.replace(config, loss=dataclasses.replace(config.loss, scaled=not config.loss.scaled))
    with world("cpu") as this:
        for changed, message in ((deeper, "model.depth: expected 2"), (unscaled, "loss.scaled: expected")):
            with pytest.raises(ConfigError, match=message):
                Trainer(changed, this, Console(quiet=True))


@pytest.mark.parametrize("change", [{"width": 2**27}, {"depth": 1000}, {"num_classes": 10**9}, {"mlp_ratio": 1e6}])
def test_settings_of_a_huge_network_are_refused_before_it_is_made(tmp_path: Path, change: dict[str, float]) -> None:
    config = digits(tmp_path / "run")
    path, network = converted(tmp_path, config)
    heads = 2**21 if "width" in change else config.model.heads
    model = dataclasses.replace(config.model, heads=heads, **change)  # type: ignore[arg-type]
    huge = dataclasses.replace(config, model=model)
    save_file(network.state_dict(), path, metadata=as_metadata(huge))
    with pytest.raises(CheckpointError, match="too few bytes"):
        load_model(path, device=CPU)
    tensors = {f"ema.{name}": value for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match="too few for the network"):
        load_model(save(tmp_path, 1, tensors, huge, ALONE), device=CPU)
