"""`python -m bench.train_step`: its rows are right, and agree however the steps are computed."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import train_step
from bench.step_trace import GROUPS
from flashjvp_commands.ending import status_of
from reports.training_tables import STEP_COLUMNS, step_table
from tests.tvm_ref.runs import together
from tvm_ref.training.batches import Batches
from tvm_ref.training.checkpoint import ALONE
from tvm_ref.training.presets import PRESETS
from verify.budget.network_tolerance import training_budget

SMALL = ["--preset", "digits", "--batch", "8", "--steps", "1", "--compile", "off", "--device", "cpu"]


def measured(out: Path, *arguments: str) -> pd.DataFrame:
    assert train_step.main([*SMALL, *arguments, "--out", str(out)]) == 0
    return pd.read_csv(out)


def in_each(out: Path) -> None:
    """As the work of a child."""
    assert train_step.main([*SMALL, "--parallel", "ddp,fsdp", "--out", str(out)]) == 0


def profiled(out: Path) -> None:
    """As the work of a child, or alone: a row of the cheapest preset, and where its time goes."""
    assert train_step.main(["--preset", "toy2d", *SMALL[2:], "--profile", str(out)]) == 0


def assert_agree(rows: pd.DataFrame) -> None:
    """In what the third step gave; float32 sums in another order."""
    for name in ("loss", "gradient_norm"):
        first = rows[name].iloc[0]
        assert (rows[name] - first).abs().max() <= training_budget(torch.float32) * first


def test_a_row_for_each_way_to_run_the_blocks(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.csv", "--checkpointing", "none,selective", "--accumulate", "2")
    assert tuple(rows.columns) == STEP_COLUMNS
    assert list(rows["checkpointing"]) == ["none", "selective"]
    assert (rows[["gpus", "batch", "accumulate", "tokens"]] == [1, 8, 2, 4]).all(axis=None)
    digits = PRESETS["digits"]().model
    assert (rows["parameters"] > 12 * digits.depth * digits.width**2).all()
    assert (rows[["ms_per_step", "first_step_s", "second_step_s", "build_s", "reserved_gib"]] > 0).all(axis=None)
    assert (rows["ms_fastest"] <= rows["ms_per_step"]).all() and (rows["ms_per_step"] <= rows["ms_slowest"]).all()
    assert rows["images_per_s"].tolist() == pytest.approx((8e3 / rows["ms_per_step"]).tolist())
    assert_agree(rows)
    assert "selective" in step_table(rows)


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    together(2, in_each, tmp_path / "two.csv")
    two, one = pd.read_csv(tmp_path / "two.csv"), measured(tmp_path / "one.csv")
    assert list(two["parallel"]) == ["ddp", "fsdp"] and list(two["gpus"]) == [2, 2]
    assert_agree(pd.concat([one, two]))


def test_a_step_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiled(tmp_path / "profile.csv")
    rows = pd.read_csv(tmp_path / "profile.csv").set_index("group")
    assert list(rows.index) == list(GROUPS) and (rows["ms"].drop(["communication", "idle"]) > 0).all()
    assert rows["ms"]["communication"] == 0 <= rows["ms"]["idle"] and (tmp_path / "profile.png").exists()
    assert "| elementwise backward |" in capsys.readouterr().out


@pytest.mark.slow
def test_time_in_communication_is_measured(tmp_path: Path) -> None:
    together(2, profiled, tmp_path / "profile.csv")
    rows = pd.read_csv(tmp_path / "profile.csv").set_index("group")
    assert rows["ms"]["communication"] > 0 and rows["gpus"].unique().tolist() == [2]


def test_the_objective_is_the_one_asked_for(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.csv", "--objective", "tvm,meanflow,flow", "--detach", "off,on")
    assert list(zip(rows["objective"], rows["detach"], strict=True)) == [
        (objective, detach) for objective in ("tvm", "meanflow", "flow") for detach in (False, True)
    ]
    norms = rows["gradient_norm"].tolist()
    assert len({*norms[:3], norms[4]}) == 4 and norms[2] == norms[3]  # only tvm has something to detach


def test_a_residual_stream_in_bfloat16_is_a_row_of_its_own(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.csv", "--precision", "bfloat16", "--residual", "float32,bfloat16")
    assert list(rows["residual"]) == ["float32", "bfloat16"]
    losses = rows["loss"].tolist()
    assert 0 < abs(losses[1] - losses[0]) <= training_budget(torch.bfloat16) * losses[0]
    assert "residual stream" in step_table(rows)


def test_other_images_have_other_tokens(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.csv", "--image-size", "16")
    assert list(rows["tokens"]) == [16] and rows["gradient_norm"][0] > 0
    (config,) = train_step.settings(train_step.parser().parse_args(["--image-size", "128", "--batch", "4"]))
    assert config.model.grid**2 == 4096


@pytest.mark.slow
def test_graphs_are_compiled_once_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    arguments = ["--preset", "toy2d", "--batch", "8", "--steps", "1", "--compile", "on,off", "--device", "cpu", "--out"]
    outs = tmp_path / "a.csv", tmp_path / "b.csv"
    assert [train_step.main([*arguments, str(out)]) for out in outs] == [0, 0]
    first, second = (pd.read_csv(out) for out in outs)
    assert first["graphs_compiled"][0] > 0 == second["graphs_compiled"][0]
    assert first["graphs_compiled"][1] == 0 == second["graphs_compiled"][1]
    assert "(cold)" in step_table(first) and "(warm)" in step_table(second)


@pytest.mark.parametrize("preset", PRESETS)
def test_synthetic_items_fit_every_preset(preset: str) -> None:
    options = train_step.parser().parse_args(["--preset", preset, "--batch", "4", "--accumulate", "2"])
    (config,) = train_step.settings(options)
    model = config.model
    parts = Batches(config, train_step.Synthetic(model, 4), ALONE).draw(0)
    assert [tuple(part.x0.shape) for part in parts] == [(2, model.channels, model.image_size, model.image_size)] * 2
    labels = torch.cat([part.labels for part in parts])
    assert bool((labels <= model.num_classes).all())
    assert len({image.numpy().tobytes() for part in parts for image in part.x0}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--accumulate", "3"], "cannot be split evenly"),
    ],
)
def test_what_cannot_be_measured_is_said(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lambda: train_step.main([*SMALL, *arguments, "--out", str(tmp_path / "rows.csv")])) == 2
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert not (tmp_path / "rows.csv").exists()
