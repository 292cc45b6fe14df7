"""The programs of examples/ run as a user runs them, and their losses fall."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"meanflow_timm": "timm", "tvm_diffusers_dit": "diffusers", "consistency_transformers": "transformers"}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_loss_falls(name: str) -> None:
    pytest.importorskip(EXAMPLES[name])
    program = f"import {name}; print('losses', *{name}.main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command, folder = [sys.executable, "-c", program], ROOT / "examples"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^losses (.*)$", done.stdout, flags=re.MULTILINE)
    assert found is not None
    losses = [float(word) for word in found[1].split()]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.8 * sum(losses[:quarter])
    if name != "consistency_transformers":  # which is registered instead
        assert re.search(r"scaled_dot_product_attention: flashjvp", done.stdout)
