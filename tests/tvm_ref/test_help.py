"""`--help` of every command explains every setting, in lines that fit the terminal, without programmers' notes."""

import importlib
import re
from typing import Any

import pytest

from tvm_ref import train
from tvm_ref.training.presets import PRESETS

WIDTH = 100
COMMANDS: dict[str, list[str]] = {
    **{f"train {preset}": ["train", preset] for preset in PRESETS},
    **{name: [name] for name in ("sample", "evaluate", "encode", "convert", "ema", "export")},
}


def shown(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python -m tvm_ref.NAME ... --help` prints."""
    name, *rest = arguments
    command: Any = importlib.import_module(f"tvm_ref.{name}")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setattr("sys.argv", [name, *rest, "--help"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_is_explained(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(COMMANDS[name], monkeypatch, capsys)
    assert f"python -m tvm_ref.{name}" in text
    assert "Raises" not in text and "Error" not in text
    inside = [re.sub(r"^│|│$", " ", line).rstrip() for line in text.splitlines() if line.startswith((" ", "│"))]
    assert all(len(line) <= WIDTH for line in inside)
    settings = re.split(r"\n  (?=-{1,2}[a-z]|[A-Z]{3,} )", "\n".join(inside))[1:]
    assert len(settings) >= 3
    for setting in settings:
        values = r"\(default: .*\)|\(required\)|\{[^}]*\}\S*|\b[A-Z,]{3,}(,\.\.\.)?\b|--\S+|(^|\s)-h,"
        explained = re.sub(values, "", " ".join(setting.split()))
        assert len(re.findall(r"[A-Za-z]{2,}", explained)) >= 2, setting


def test_the_help_without_a_preset_says_how_to_see_every_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(["train"], monkeypatch, capsys)
    assert "python -m tvm_ref.train digits --help lists every setting" in text
    assert all(preset in text for preset in PRESETS)
    assert train.DEFAULT in PRESETS


@pytest.mark.parametrize("columns", ["1", "-1", "0", "x"])
def test_help_ends_in_a_terminal_of_no_width(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.argv", ["convert", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("tvm_ref.convert").main()
    assert end.value.code == 0 and "NETWORK" in capsys.readouterr().out
