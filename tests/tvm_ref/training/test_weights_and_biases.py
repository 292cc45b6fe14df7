"""Metrics for Weights & Biases: with a stand-in for its package, and with the package where it is installed."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.tvm_ref.runs import change, toy, train
from tvm_ref.training import weights_and_biases
from tvm_ref.training.config import ConfigError
from tvm_ref.training.logger import MetricsError


class StandIn(types.ModuleType):
    """What of the package wandb is used."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.fails = ""

    def init(self, **settings: Any) -> Any:
        run: dict[str, Any] = {**settings, "logged": [], "ended": False}
        self.runs.append(run)

        def log(values: dict[str, float], step: int) -> None:
            if self.fails:
                raise self.Error(self.fails)
            run["logged"].append((step, values))

        return types.SimpleNamespace(log=log, finish=lambda: run.update(ended=True))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    package = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(weights_and_biases, "is_missing", lambda: False)
    return package


def test_every_row_is_sent_and_a_run_that_goes_on_is_the_same_one(tmp_path: Path, wandb: StandIn) -> None:
    config = toy(tmp_path / "run", steps=4, wandb="project", log_norms=2, loss_bins=2)
    train(config)
    train(change(config, steps=6))
    one, two = wandb.runs
    assert one["project"] == two["project"] == "project" and one["name"] == "run"
    assert one["id"] == two["id"] and one["resume"] == two["resume"] == "allow"
    assert one["config"]["optim"]["lr"] == config.optim.lr
    assert one["ended"] and two["ended"]
    assert [step for step, _ in one["logged"] + two["logged"]] == [1, 2, 3, 4, 5, 6]
    values = one["logged"][1][1]
    assert {"loss", "images_per_second", "gradient_norm/blocks.0", "activation_rms/blocks.0"} <= values.keys()
    assert "flow_by_t/0.500" in values or "velocity_by_t/0.500" in values
    assert "tangent_rms/final_layer" not in values  # there is none
    train(toy(tmp_path / "other", steps=1, wandb="project"))
    assert wandb.runs[2]["id"] != one["id"]


def test_its_errors_end_the_run_and_are_named(tmp_path: Path, wandb: StandIn) -> None:
    wandb.fails = "the network\nis gone"
    with pytest.raises(MetricsError, match=r"run\.wandb: the network is gone"):
        train(toy(tmp_path, steps=4, wandb="project"))


def test_without_the_package_it_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"package wandb .* pip install 'flashjvp\[wandb\]'"):
        train(toy(tmp_path, steps=1, wandb="project"))
    assert not (tmp_path / "metrics.csv").exists()


def test_the_package_is_not_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    train(toy(tmp_path, steps=1))


@pytest.mark.skipif(weights_and_biases.is_missing(), reason="the package wandb is not installed")
def test_the_package_itself_takes_the_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = toy(tmp_path, steps=2, wandb="project")
    train(config)
    train(change(config, steps=4))
    ident = (tmp_path / weights_and_biases.ID).read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ident}/run-{ident}.wandb"))) == 2
