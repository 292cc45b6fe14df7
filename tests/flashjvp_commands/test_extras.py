"""A command whose packages are missing says in one line what to install; nobody else is stopped."""

import subprocess
import sys
from pathlib import Path

import pytest

from flashjvp_commands import extras

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = """import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}.split(","): raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
"""


def run(folder: Path, hidden: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python without some packages: sitecustomize hides them."""
    (folder / "sitecustomize.py").write_text(HIDDEN.format(names=hidden))
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.sampled(of=4)
@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("tvm_ref.train", "tyro", "train"),
        ("tvm_ref.convert", "safetensors,tyro", "train"),
        ("verify", "rich", "train,eval"),
        ("verify.faults", "pandas", "train,eval"),
        ("bench.sweep", "pandas,matplotlib", "train,eval"),
        ("reports.build", "matplotlib", "eval"),
    ],
)
def test_what_to_install_is_said_in_one_line(module: str, hidden: str, extra: str, tmp_path: Path) -> None:
    done = run(tmp_path, hidden, "-m", module, "--help")
    said = f"pip install 'flashjvp[{extra}]'"
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1, done
    assert all(name in done.stderr for name in hidden.split(","))


@pytest.mark.parametrize("module", ["tvm_ref.train", "tvm_ref.sample", "bench.sweep", "verify", "flashjvp.check"])
def test_an_import_that_fails_is_said_in_one_line(module: str, tmp_path: Path) -> None:
    """Here PyTorch is missing. Too little memory for it ends in an ImportError, too."""
    done = run(tmp_path, "torch", "-m", module, "--help" if module == "verify" else "x")
    assert done.returncode == 1 and done.stderr == "error: torch\n", done


@pytest.mark.slow
@pytest.mark.parametrize("module", ["flashjvp", "flashjvp.check"])
def test_the_library_needs_none_of_them(module: str, tmp_path: Path) -> None:
    everything = {name for names in extras.EXTRAS.values() for name in names} - {"numpy"}
    done = run(tmp_path, ",".join(sorted(everything)), "-m", module, "--help")
    assert done.returncode == 0 and "usage" in done.stdout, done


def test_a_program_that_imports_a_package_is_not_stopped(tmp_path: Path) -> None:
    """Only `python -m tvm_ref...` is: another program's Ctrl-C stays its own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(
        "import signal, sys\nbefore = signal.getsignal(signal.SIGINT), sys.excepthook\nimport tvm_ref\n"
        "assert (signal.getsignal(signal.SIGINT), sys.excepthook) == before != (signal.SIG_DFL, before[1])\n"
    )
    (tmp_path / "mine" / "__main__.py").write_text("print('ran')\n")
    done = run(tmp_path, "tyro", "-m", "mine")
    assert done.stdout == "ran\n", done


def test_every_extra_of_pyproject_is_known() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"pillow": "PIL", "pot": "ot", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    for extra, names in extras.EXTRAS.items():
        found = {line.split(">")[0].split(";")[0].strip() for line in declared[extra]}
        assert {imported.get(name, name) for name in found} == set(names), extra
