"""torch.compile(fullgraph=True) of plain, explicit and func.jvp uses, each case in a process of its own (see
compiled.py)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flashjvp.dispatch.compiled import CASES

ROOT = Path(__file__).parents[3]
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler"
)


def run(case: str, compiler: str, cache: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # they do not see changes of a fake rule
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # to find that out takes a third of the time
    }
    command = [sys.executable, "-m", "tests.flashjvp.dispatch.compiled", case, compiler]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0 and child.stdout.strip().endswith("ok"), child.stderr[-3000:]


@pytest.mark.sampled(of=18)
@pytest.mark.parametrize("case", [*CASES, "dynamic_lengths"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_fullgraph(case: str, compiler: str, tmp_path: Path) -> None:
    run(case, compiler, tmp_path)


def test_compiled_autograd(tmp_path: Path) -> None:
    run("compiled_autograd", "eager", tmp_path)
