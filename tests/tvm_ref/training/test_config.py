"""Training settings: invalid ones are refused, and JSON files are read back exactly."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from tests.tvm_ref.runs import change, digits, toy
from tvm_ref.training.config import (
    ConfigError,
    OptimConfig,
    RunConfig,
    TrainConfig,
    differences,
    load_config,
    save_config,
)
from tvm_ref.training.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]()
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("betas", (0.9, 1.0)), ("eps", 0.0), ("weight_decay", -1.0), ("clip", 0.0), ("target_ema", 1.0)],
)
def test_a_setting_of_the_optimizer_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.{name}: expected .*, got"):
        OptimConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["steps", "batch", "accumulate", "context_parallel", "save_every", "keep", "sample_every", "log_every"]
)
def test_a_count_below_one_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.{name}: expected at least 1, got 0"):
        RunConfig(**({"steps": 1, "batch": 1, "out": "x"} | {name: 0}))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_a_residual_stream_in_bfloat16_is_refused_beside_another_precision(
    precision: Literal["float32", "tf32", "float16"],
) -> None:
    expected = rf"run\.residual: expected float32 with precision {precision}, got 'bfloat16'"
    with pytest.raises(ConfigError, match=expected):
        RunConfig(steps=1, batch=1, out="x", precision=precision, residual="bfloat16")


def test_guidance_needs_classes_and_an_input_where_it_is_random(tmp_path: Path) -> None:
    points, images = toy(tmp_path), digits(tmp_path)
    with pytest.raises(ConfigError, match=r"loss\.w: expected 1"):
        dataclasses.replace(points, loss=dataclasses.replace(points.loss, w=2.0))
    with pytest.raises(ConfigError, match=r"model\.guidance: expected True"):
        dataclasses.replace(
            images,
            model=dataclasses.replace(images.model, guidance=False),
            loss=dataclasses.replace(images.loss, w_random=(1.0, 2.0)),
        )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("run", "steps"), "many", r"run\.steps: expected a whole number, got 'many'"),
        (("run", "steps"), True, r"run\.steps: expected a whole number, got True"),
        (("run", "steps"), 0, r"run\.steps: expected at least 1, got 0"),
        (
            ("run", "precision"),
            "float4",
            r"run\.precision: expected one of float32, tf32, bfloat16, float16, float8, got 'float4'",
        ),
        (("optim", "betas"), [0.9], r"optim\.betas: expected .*, got \[0\.9\]"),
        (("optim", "color"), 1, r"optim: expected the fields .*, got"),
        (("model",), 3, r"model: expected the fields .*, got 3"),
    ],
)
def test_a_file_with_another_content_is_refused(
    tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    file = tmp_path / "config.json"
    save_config(toy(tmp_path), file)
    content = json.loads(file.read_text())
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"config.json is no training configuration: {message}"):
        load_config(file)


def test_differences_are_those_that_change_results(tmp_path: Path) -> None:
    old = toy(tmp_path)
    free = change(old, steps=99, out="elsewhere", save_every=7, compile=True, accumulate=2, parallel="fsdp")
    assert differences(old, free) == []
    assert differences(old, change(old, batch=48, seed=1)) == [
        "run.batch: 24 before, 48 now",
        "run.seed: 0 before, 1 now",
    ]
    other: TrainConfig = dataclasses.replace(old, model=dataclasses.replace(old.model, width=16))
    assert differences(old, other) == ["model.width: 8 before, 16 now"]
