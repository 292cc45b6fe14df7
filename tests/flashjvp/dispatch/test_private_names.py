"""PyTorch's private names may go: that costs speed, never the import and never a result."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from flashjvp import _torch

ROOT = Path(__file__).resolve().parents[3]
PRIVATE = re.findall(r'_find\(f?"([\w.]+)', (ROOT / "flashjvp" / "_torch" / "__init__.py").read_text())


def test_without_any_one_private_name_every_derivative_is_right(sampled: Callable[..., list[str]]) -> None:
    removed = ["", *sampled(PRIVATE, of=4)]  # "" removes none
    command = [sys.executable, "-m", "tests.flashjvp.dispatch.removed_names", *removed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    failed: dict[str, list[str]] = json.loads(child.stdout.splitlines()[-1])
    assert failed == {name: [] for name in removed}


def test_this_pytorch_has_the_names_that_speed_stands_on() -> None:
    assert _torch.PER_LEVEL and _torch.CAN_SKIP_DISPATCHER
    assert _torch.CAN_CALL_BELOW_JVP and _torch.CAN_CALL_BELOW_VMAP
    assert _torch.EMPTY_STRIDED.keys() == {"cpu", "cuda"}


def private_uses(path: Path) -> list[str]:
    """Imports from PyTorch's private modules and of its private names, and their use as torch._name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            names = [node.module, *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.", "forward_ad.")):
            names = [ast.unparse(node)]
        else:
            continue
        found += [f"{path.name}: {name}" for name in names if is_private(name)]
    return found


def is_private(name: str) -> bool:
    if name.startswith("torch.ops."):  # operators may have such names
        return False
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def test_one_file_names_what_is_private() -> None:
    files = [path for path in (ROOT / "flashjvp").rglob("*.py") if path != ROOT / "flashjvp" / "_torch" / "__init__.py"]
    assert not [use for path in files for use in private_uses(path)]
    assert private_uses(Path(__file__).with_name("removed_names.py"))  # that the search finds any


PROBE = """
import os, sys, torch
from flashjvp import _torch
from flashjvp._torch import levels, probe
def refuse(*args):
    raise RuntimeError("must override the setup_context staticmethod")
for change in sys.argv[1:]:
    if (child := os.fork()) == 0:
        exec(change)
        print(probe.holds(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
CHANGES = {
    "": True,
    "levels.Node.apply = classmethod(refuse)": False,
    "_torch.any_requires_grad = lambda *tensors: False": False,
    "_torch.make_dual = lambda primal, tangent: primal": False,
}


def test_the_probe_tells_a_pytorch_that_has_changed() -> None:
    """Each change is made in a process of its own, forked from one that has the modules."""
    command = [sys.executable, "-c", PROBE, *CHANGES]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert child.stdout.split() == [str(holds) for holds in CHANGES.values()], child.stderr[-2000:]


def test_an_unknown_release_is_probed_and_a_changed_one_is_said_once() -> None:
    program = """
import warnings, torch
import torch._functorch.autograd_function, torch._functorch.utils as utils

torch.__version__ = "9.9.0"
def refuse():
    raise RuntimeError("not allowed")
utils.enable_single_level_autograd_function = refuse  # where functorch's own modules have it already
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import flashjvp
    q = torch.randn(1, 2, 3, 4)
    d_q = torch.func.grad(lambda q: flashjvp.attention(q, q, q).sum())(q)
assert d_q.isfinite().all() and not flashjvp.dispatch.derivatives.BY_LEVEL
print(*(w.category.__name__ for w in seen if "flashjvp" in str(w.message)))
"""
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert child.stdout.strip() == "FlashJVPPerformanceWarning", child.stderr[-2000:]
