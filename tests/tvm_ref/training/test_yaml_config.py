"""Settings in YAML: read back exactly, overridden by options, and refused in one line that names the setting."""

import contextlib
import dataclasses
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.tiers import examples
from tests.tvm_ref.runs import command_line, digits, toy, train
from tvm_ref import train as command
from tvm_ref.training.config import MOST_STEPS, ConfigError
from tvm_ref.training.presets import PRESETS
from tvm_ref.training.yaml_config import MOST_YAML, with_yaml, write_yaml


def given_text(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]()
    write_yaml(config, tmp_path / "config.yaml")
    for other in PRESETS.values():  # every setting is there, so it does not matter what it is read into
        assert with_yaml(other(), tmp_path / "config.yaml") == config


@settings(max_examples=examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example("\x85", 1.0, 1)
@example("a\u2028 b\u2029", 1.0, 1)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    st.floats(1e-300, 1e300),
    st.integers(1, MOST_STEPS),
)
def test_every_text_and_number_is_read_back(tmp_path: Path, text: str, number: float, count: int) -> None:
    config = toy(tmp_path)
    run = dataclasses.replace(config.run, out=text, resume="1e5", init="yes", vae="null", steps=count)
    config = dataclasses.replace(config, run=run, optim=dataclasses.replace(config.optim, lr=number))
    write_yaml(config, tmp_path / "config.yaml")
    assert with_yaml(toy(Path("other")), tmp_path / "config.yaml") == config


def test_a_run_writes_its_settings(tmp_path: Path) -> None:
    config = digits(tmp_path / "run", steps=1)
    train(config)
    assert with_yaml(PRESETS["toy2d"](), tmp_path / "run/config.yaml") == config


def test_a_file_changes_a_preset_and_options_change_the_file(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-4, betas: [0.8, 0.9]}\nrun:\n  steps: 7\n  out: here  # of the run\nloss:\n  w: 3\n"
    path = given_text(tmp_path, text)
    found = command.parse(["digits", "--run.steps", "9", "--config", str(path), "--optim.betas", "0.5,0.6"])
    preset = PRESETS["digits"]()
    assert found == dataclasses.replace(
        preset,
        run=dataclasses.replace(preset.run, steps=9, out="here"),
        optim=dataclasses.replace(preset.optim, lr=1e-4, betas=(0.5, 0.6)),
        loss=dataclasses.replace(preset.loss, w=3.0),
    )
    assert command.parse([f"--config={path}"]).run.steps == 7
    assert command.parse(["--config", str(given_text(tmp_path, "# nothing\n"))]) == preset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {color: 1}", "optim.color is no setting; expected one of lr, "),
        ("optimiser: {lr: 1}", "optimiser is no setting; expected one of model, "),
        ("optim: {lr: fast}", r"optim\.lr: expected a number, got 'fast'"),
        ("optim: {lr: -1}", r"optim\.lr: expected more than 0, got -1"),
        ("optim: {lr: .nan}", r"optim\.lr: expected a finite number"),
        ("optim: {lr: 2026-11-29}", r"optim\.lr: expected .*, got '2026-11-29'"),
        ("optim: {betas: [0.9]}", r"optim\.betas: expected a list of 2, each a number, got \[0\.9\]"),
        ("run: {compile: yes}", r"run\.compile: expected true or false, got 'yes'"),
        ("run: {steps: 1.5}", r"run\.steps: expected a whole number, got 1\.5"),
        ("run: {steps: 1:30}", r"run\.steps: expected a whole number, got '1:30'"),
        ("run: {precision: float4}", r"run\.precision: expected one of .*, float16, float8, got 'float4'"),
        ("run: {steps: }", r"run\.steps: expected a whole number, got null"),
        ("loss: {w_random: 1}", r"loss\.w_random: expected a list of 2, each a number or null, got 1"),
        ('run: {out: "a\\0b"}', r"run\.out: expected text in UTF-8 without null characters"),
        ('run: {out: "\\ud800"}', r"run\.out: expected text in UTF-8"),
        (f"run: {{steps: {'9' * 5000}}}", "no YAML file of settings: "),
        ("run: 3", "run: expected settings by name, got 3"),
        ("[1, 2]", r"the file: expected settings by name, got \[1, 2\]"),
        ("run: {steps: 1, steps: 2}", "expected names, each once, got 'steps'"),
        ("run: {1: 2}", "expected names, each once, got 1"),
        ("run: &a {steps: 1}", "expected no anchors, aliases or tags"),
        ("run: *a", "expected no anchors, aliases or tags"),
        ("run: !!python/object/apply:os.mkdir [x]", "expected no anchors, aliases or tags"),
        ("run: {steps: !!int '3'}", "expected no anchors, aliases or tags"),
        ("run: {steps: 1", "no YAML file of settings: "),
        ("\0", "no YAML file of settings: "),
        ("[" * 5000, "expected at most 20 levels"),
        ("- " * 5000, "expected at most 20 levels"),
        ("run: {steps: 1}\n---\nrun: {steps: 2}", "no YAML file of settings: "),
        ("#" * (MOST_YAML + 1), f"expected at most {MOST_YAML} bytes"),
    ],
)  # fmt: skip
def test_what_is_no_setting_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = given_text(tmp_path, text)
    before = time.monotonic()
    with pytest.raises(ConfigError, match=message) as error:
        with_yaml(toy(tmp_path), path)
    assert "settings.yaml" in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - before < 5


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(ConfigError, match="expected no anchors, aliases or tags"):
        with_yaml(toy(tmp_path), given_text(tmp_path, bomb))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="fifo is no YAML file of settings: expected a regular file"):
        with_yaml(toy(tmp_path), tmp_path / "fifo")
    for words, said in (
        (["--config", str(tmp_path / "nope")], "No such file"),
        (["--config"], "error: --config: expected one YAML file"),
        (["--config", "a", "--config", "b"], "error: --config: expected one YAML file"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            command.main([*command_line(tmp_path), *words])
        assert said in capsys.readouterr().err


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=5000)
@given(st.binary(max_size=200) | st.text("[]{}:,-&*!|>'\"#%@ \n\tab1", max_size=200).map(str.encode))
def test_other_content_is_refused_or_read_and_never_fails_otherwise(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        assert with_yaml(toy(tmp_path), path) == toy(tmp_path)
