"""`--help` of every command fits 80 columns, and names the options that all commands share alike."""

import importlib
import re
from typing import Any

import pytest

from flashjvp_commands.ending import status_of

COMMANDS: dict[str, tuple[str, ...]] = {
    "flashjvp": ("flashjvp.__main__",),
    "flashjvp.check": ("flashjvp.diagnosis.command",),
    "verify": ("verify.__main__",),
    **{f"verify {name}": ("verify.__main__", name) for name in ("model", "published", "faults", "codegen")},
    "bench": ("bench.__main__",),
    **{
        f"bench {name}": ("bench.__main__", name)
        for name in ("sweep", "train-step", "train-quality", "interleaved", "host", "tune")
    },
    "reports.build": ("reports.build",),
    "reports.api": ("reports.api",),
    **{f"tvm_ref.{name}": (f"tvm_ref.{name}",) for name in ("train", "sample", "evaluate", "encode", "convert")},
    "tvm_ref.experiments": ("tvm_ref.experiments.__main__",),
    **{f"tvm_ref.train {preset}": ("tvm_ref.train", preset) for preset in ("digits", "imagenet256-w2")},
}
WIDTH = 80
# Options that mean one thing wherever they are, and a word of the help that says it.
SHARED = {"--seed": ("number", "seed"), "--device": ("cuda",), "--out": ("folder",), "--quick": ("sample",)}


def help_of(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    module, *rest = COMMANDS[name]
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    command: Any = importlib.import_module(module)
    arguments = [*rest, "--help"]
    assert status_of(lambda: getattr(command, "cli", command.main)(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, monkeypatch, capsys)
    assert not [line for line in text.splitlines() if len(line) > WIDTH]
    assert name.split()[0] in text
    for option, said in SHARED.items():
        for entry in re.findall(rf"(?ms)^[│ ]+{option}\b.*?(?=^[│ ]+-|^╰|\Z)", text):
            assert any(word in entry.lower() for word in said), entry


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_help_is_as_wide_as_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.flashjvp_commands.test_help.WIDTH", columns)
    text = help_of("tvm_ref.evaluate", monkeypatch, capsys)
    outside = [line for line in text.splitlines() if not line.startswith(("│", "╭", "╰", "|", "+", "usage"))]
    assert max(map(len, outside)) <= columns
