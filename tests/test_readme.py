"""The README's examples run as they stand, its links lead somewhere, and its commands exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
NAMES = ("plain", "func_jvp", "explicit_tangents", "compile")


def test_there_is_one_example_for_each_use() -> None:
    assert len(EXAMPLES) == len(NAMES)
    assert all(re.search(r"assert", example) for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_example_runs(example: str) -> None:
    if "torch.compile" in example and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, and there is none")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # to find that out takes a third of the time
    result = subprocess.run([sys.executable, "-c", example], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_relative_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_make_commands_of_the_readme_are_targets() -> None:
    commands = set(re.findall(r"\bmake (\w+)", README))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"sweep", "test"} <= commands <= targets
