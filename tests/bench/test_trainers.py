"""The step of the published trainer, with a stand-in for its code: the same numbers as tvm_ref's, and typed errors."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import train_step, trainers
from reports.training_tables import PEER, step_table
from tests.verify.model.stand_in import WRAPPER
from tvm_ref.training.batches import Batches
from tvm_ref.training.checkpoint import ALONE
from tvm_ref.training.config import ConfigError, TrainConfig
from tvm_ref.training.parallel import World
from tvm_ref.training.presets import PRESETS
from tvm_ref.training.state import initialised
from verify.budget.network_tolerance import training_budget

ON_GPU = World(0, 1, torch.device("cuda", 0))


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    for name, text in (("wrapper.py", WRAPPER.replace("FACTOR", "1")), ("__init__.py", "")):
        (tmp_path / "checkout/training").mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout/training" / name).write_text(text)
    yield tmp_path / "checkout"
    for name in [name for name in sys.modules if name.split(".")[0] in ("training", "timm")]:
        del sys.modules[name]


def configured(**run: object) -> TrainConfig:
    config = PRESETS["digits"]()
    config = replace(config, loss=replace(config.loss, w=2.0, w_random=None))
    return replace(config, run=replace(config.run, batch=8, compile=False, precision="float32", device="cpu", **run))


def test_both_trainers_make_the_same_steps(checkout: Path) -> None:
    config = configured()
    start = initialised(config, ALONE)
    batches = Batches(config, train_step.Synthetic(config.model, 8), ALONE)
    with trainers.official_module(checkout) as wrapper:
        theirs = trainers.OfficialStep(wrapper, config, start, ALONE)
        ours = trainers.TvmRefStep(config, start, ALONE)
        assert theirs.parameters == ours.parameters > 0
        for number in range(3):
            one, other = (torch.tensor(step(batches.draw(number))) for step in (ours, theirs))
            assert (one - other).abs().max() <= training_budget(torch.float32) * one.abs().max()


def test_settings_that_the_published_code_has_are_measured_once() -> None:
    configs = [configured(), configured(checkpointing="full"), configured(cuda_graph=True)]
    found = trainers.official_settings(configs, ON_GPU)
    assert found == [configured()]


@pytest.mark.parametrize(
    ("run", "loss", "this", "message"),
    [
        ({"accumulate": 2}, {}, ON_GPU, "--accumulate 1, got 2"),
        ({}, {"objective": "flow"}, ON_GPU, "--objective tvm, got flow"),
        ({}, {}, ALONE, "a GPU, got cpu"),
        ({}, {}, World(0, 2, torch.device("cuda", 0)), "one process, got 2"),
    ],
)
def test_other_settings_are_refused(run: dict, loss: dict, this: World, message: str) -> None:
    config = configured(**run)
    with pytest.raises(ConfigError, match=f"expected {message}"):
        trainers.official_settings([replace(config, loss=replace(config.loss, **loss))], this)


def test_the_command_says_what_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "digits", "--device", "cpu", "--out", str(tmp_path / "rows.csv"), "--peer"]
    assert train_step.main([*arguments, f"official={tmp_path}"]) == 2
    assert "expected a checkout of lumalabs/tvm" in capsys.readouterr().out
    assert not (tmp_path / "rows.csv").exists()
    with pytest.raises(SystemExit):
        train_step.main([*arguments, str(tmp_path)])
    assert "expected official=PATH" in capsys.readouterr().err


def test_a_table_says_how_many_times_as_fast_a_row_is_as_the_peer(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--preset", "toy2d", "--batch", "8", "--steps", "1", "--compile", "off", "--device", "cpu"]
    assert train_step.main([*arguments, "--out", str(out)]) == 0
    rows = pd.read_csv(out)
    both = pd.concat([rows, rows.assign(trainer=PEER, images_per_s=rows["images_per_s"] / 4)])
    assert f"against {PEER}" not in step_table(rows)
    first, second = [line for line in step_table(both).splitlines() if line.startswith("| 1 ")]
    assert first.endswith("| 4.00 |") and second.endswith("| 1.00 |") and PEER in second
