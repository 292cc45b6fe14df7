"""The examples of docs/ run as they stand and print what is shown, links lead somewhere, and commands are accepted."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from tests import tiers
from tests.tvm_ref.runs import finish, start
from tvm_ref import train
from tvm_ref.convert import ConvertConfig
from tvm_ref.ema import EmaSettings
from tvm_ref.encode import EncodeConfig
from tvm_ref.evaluate import EvaluateConfig
from tvm_ref.experiments import __main__ as experiments
from tvm_ref.export import ExportConfig
from tvm_ref.sample import SampleConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLE = re.compile(r"^```python\n(.*?)^```(?:[^`]*?^```text\n(.*?)^```)?", flags=re.DOTALL | re.MULTILINE)
COMPILED = pytest.mark.slow  # the README compiles, too
EXAMPLES = [
    pytest.param(*found.groups(), id=f"{page.stem}-{i}", marks=[COMPILED] if "torch.compile(" in found[1] else [])
    for page in PAGES
    for i, found in enumerate(EXAMPLE.finditer(page.read_text()))
]
COMMAND = re.compile(r"(?:python -m|torchrun .*-m) tvm_ref\.(\w+) ?(.*)")
CONFIGS: dict[str, Any] = {
    "convert": ConvertConfig, "ema": EmaSettings, "encode": EncodeConfig, "evaluate": EvaluateConfig,
    "export": ExportConfig, "sample": SampleConfig,
}  # fmt: skip


def commands() -> list[tuple[str, str]]:
    """(module, arguments) of every command in a block of shell, continued lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            found += COMMAND.findall(re.sub(r"\\\n\s*", " ", block))
    return found


@pytest.mark.parametrize(("example", "shown"), EXAMPLES)
def test_example_runs_and_prints_what_is_shown(example: str, shown: str | None, tmp_path: Path) -> None:
    """In a process of its own; in the fast tier it is forked from one that has PyTorch loaded."""
    if "torch.compile(" in example and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none")
    printed = tmp_path / "printed"
    if tiers.is_fast:
        finish(start(run_example, example, printed))
    else:
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with printed.open("w") as file:
            subprocess.run([sys.executable, "-c", example], cwd=ROOT, env=variables, stdout=file, check=True)
    assert shown is None or printed.read_text() == shown


def run_example(example: str, printed: Path) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        exec(example, {"__name__": "__main__"})


def test_the_recipes_assert_what_they_show() -> None:
    recipes = [str(example.values[0]) for example in EXAMPLES if str(example.id).startswith("examples-")]
    assert len(recipes) == 3
    assert all(re.search(r"assert", recipe) and "flashjvp.attention" in recipe for recipe in recipes)


def test_the_pitfall_is_shown_by_what_an_example_prints() -> None:
    shown = [str(example.values[1]) for example in EXAMPLES]
    assert sum("F.layer_norm" in text for text in shown) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_commands_are_found() -> None:
    assert {module for module, _ in commands()} == {"train", "experiments", *CONFIGS}


@pytest.mark.parametrize(("module", "arguments"), commands())
def test_commands_are_accepted(module: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(arguments, comments=True)
    if module == "train":
        monkeypatch.setattr(train, "with_yaml", lambda config, _: config)  # of a run that is not there
        train.parse(words)
    elif module == "experiments":
        experiments.parse(words)
    else:
        tyro.cli(CONFIGS[module], args=words)
