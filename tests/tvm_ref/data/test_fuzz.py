"""Mutated files: every reader reads or refuses them, in time and memory, and nothing in them is executed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("examples", "seed"), [(240, 0), pytest.param(10_000, 1, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused(examples: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.tvm_ref.data.fuzz_child", str(examples), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
