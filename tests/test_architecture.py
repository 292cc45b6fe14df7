"""Rules that a reader relies on: who imports whom, how long things get, what `import flashjvp` needs."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "flashjvp": set(),
    "flashjvp_commands": set(),
    "reports": {"flashjvp_commands"},
    "tvm_ref": {"flashjvp", "flashjvp_commands"},
    "verify": {"flashjvp", "flashjvp_commands", "tvm_ref", "reports"},
    "bench": {"flashjvp", "flashjvp_commands", "tvm_ref", "verify", "reports"},
    "examples": {"flashjvp"},
}
# What is used where it is installed, and by whom; each has something that stands in for it.
OPTIONAL = {"flashjvp/diagnosis/table.py": {"rich"}}
MOST_LINES_OF_A_FILE = 300
# Data, not code: as long as they need to be.
TABLES = (
    "flashjvp/kernels/launch/tables.py", "flashjvp/kernels/launch/hopper_tables.py", "verify/faults/fault_list*.py"
)  # fmt: skip
MOST_LINES_OF_A_FUNCTION = 80
Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_packages(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the absolute imports anywhere in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def lines_of_code(function: Function) -> int:
    """From the `def` to the last line, the docstring not counted."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        length -= docstring.end_lineno - docstring.lineno + 1
    return length


def test_every_folder_is_held_by_the_rules() -> None:
    found = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "build"}
    assert found <= MAY_IMPORT.keys()
    assert {"flashjvp", "flashjvp_commands", "tvm_ref", "bench", "verify", "reports", "examples"} == MAY_IMPORT.keys()


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_siblings_are_imported_only_in_the_allowed_directions(folder: str) -> None:
    siblings = MAY_IMPORT.keys() - {folder}
    wrong = [
        f"{name(path)} imports {package}"
        for path in python_files(folder)
        for package in imported_packages(ast.parse(path.read_text()))
        if package in (siblings - MAY_IMPORT[folder]) | {"tests"}
    ]
    assert not wrong


def test_flashjvp_imports_only_torch_triton_and_the_standard_library() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "flashjvp"}
    wrong = [
        f"{name(path)} imports {package}"
        for path in python_files("flashjvp")
        for package in imported_packages(ast.parse(path.read_text()))
        if package not in allowed | OPTIONAL.get(name(path), set())
    ]
    assert not wrong


def test_relative_imports_stay_inside_their_folder() -> None:
    wrong = [
        f"{name(path)}:{node.lineno}"
        for folder in MAY_IMPORT
        for path in python_files(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level >= len(path.relative_to(ROOT).parts)
    ]
    assert not wrong


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in python_files(*MAY_IMPORT, "tests"):
        text = path.read_text()
        lengths = {}
        if not any(path.match(table) for table in TABLES):
            lengths[name(path)] = (len(text.splitlines()), MOST_LINES_OF_A_FILE)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                lengths[f"{name(path)}:{node.lineno} {node.name}"] = (lines_of_code(node), MOST_LINES_OF_A_FUNCTION)
        long += [f"{where}: {lines} lines" for where, (lines, most) in lengths.items() if lines > most]
    assert not long


def test_one_file_asks_what_the_machine_is() -> None:
    """So that tests can stand for another machine there, and nowhere else (the fixture `machine`)."""
    asks = ("get_device_capability", "get_device_name", "is_current_stream_capturing", "version.hip", "find_spec")
    found = {name(path): [word for word in asks if word in path.read_text()] for path in python_files("flashjvp")}
    assert {path for path, words in found.items() if words} == {"flashjvp/environment.py"}


def test_tolerances_are_stated_once() -> None:
    """A number after atol=, rtol= or the like belongs in verify/budget/tolerance.py; exact comparison (0) is free."""
    keywords = {"atol", "rtol", "abs", "rel", "abs_tol", "rel_tol"}
    wrong = [
        f"{name(path)}:{node.lineno} {keyword.arg}={keyword.value.value!r}"
        for path in python_files(*MAY_IMPORT, "tests")
        if path != ROOT / "verify" / "budget" / "tolerance.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in keywords and isinstance(keyword.value, ast.Constant) and keyword.value.value not in (0, None)
    ]
    assert not wrong


def test_import_and_use_need_neither_triton_nor_a_gpu() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, flashjvp
assert not torch.cuda.is_available()
q, k, v = torch.randn(3, 1, 2, 5, 4)
o, o_t = flashjvp.attention_jvp(q, k, v, q_t=torch.ones_like(q))
assert o.shape == o_t.shape == q.shape and o.isfinite().all() and o_t.isfinite().all()
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_import_does_not_bring_the_compiler() -> None:
    """torch._dynamo takes more than a second, and where it is loaded operators look for levels that it may enter."""
    program = "import sys, torch, flashjvp; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
