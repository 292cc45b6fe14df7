"""Everything that README.md and docs/ name works from a wheel, installed into an empty environment, outside of the
checkout. The environment sees the packages of this one, but not this checkout."""

import os
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = (
    "flashjvp-verify", "flashjvp-bench", "tvm-train", "tvm-sample", "tvm-evaluate", "tvm-encode", "tvm-convert",
)  # fmt: skip
MODULES = (
    "flashjvp", "flashjvp.check", "verify", "verify model", "verify faults", "verify codegen", "verify published",
    "bench", "bench.sweep", "bench.tune", "bench.host", "bench.interleaved", "bench.train_step", "bench.train_quality",
    "reports.build", "reports.api", "tvm_ref.train", "tvm_ref.sample", "tvm_ref.evaluate", "tvm_ref.encode",
    "tvm_ref.convert",
)  # fmt: skip
# One after the other, in one folder: a command, its exit status, words that it prints.
RUNS = (
    ("python -m flashjvp", 0, "tiled: plain PyTorch"),
    ("python -m flashjvp.check small:model --json report.json", 0, "right"),
    ("python -m verify --case gqa --backend tiled --dtype float32 --device cpu --seed 0", 0, "all 8 rows held"),
    ("flashjvp-verify --case gqa --backend tiled --dtype float32 --device cpu --out v.csv", 0, "wrote v.csv"),
    ("flashjvp-verify faults --only FAULT --out faults.csv", 0, "1 of 1 faults caught"),
    ("flashjvp-verify model --quick --device cpu --case nothing", 2, "no such case"),
    ("flashjvp-bench sweep --device cpu --seq 64 --modes fwd --providers flashjvp --out s.csv", 0, "s.csv"),
    ("flashjvp-bench train-step --preset toy2d --batch 8 --steps 1 --compile off --device cpu", 0, "images/s"),
    ("flashjvp-bench train-quality toy2d --set '--run.steps 2'", 0, "wrote flashjvp-data"),
    ("flashjvp-bench tune --compile-only --head-dim 64 --family forward --budget-s 5", 0, "log: flashjvp-data"),
    ("flashjvp-bench host --out host.csv", 2, "flashjvp-bench host"),
    ("python -m bench.interleaved --out interleaved.csv", 2, "python -m bench.interleaved"),
    ("tvm-train toy2d --run.steps 2 --run.device cpu --run.no-evaluate --run.out runs/toy2d", 0, "done: 2 steps"),
    ("tvm-sample runs/toy2d --nfe 1 --device cpu --out grid.png", 0, "samples written to grid.png"),
    ("tvm-evaluate runs/toy2d --nfe 1,2 --samples 16 --device cpu --out quality.json", 0, "w2"),
    ("tvm-encode flashjvp-data --vae nothing --device cpu --out a.zip", 1, "error: "),
    ("tvm-convert nothing.pkl weights.safetensors", 1, "nothing.pkl"),
    ("python -m reports.build", 2, "expected a checkout"),
    ("python -m reports.api --check", 2, "expected a checkout"),
)  # fmt: skip
SMALL_MODEL = """import torch, flashjvp
class Model(torch.nn.Module):
    def forward(self, x): return flashjvp.attention(x, x, x)
def model():
    x = torch.randn(2, 2, 4, 8)
    return Model(), (x,), (torch.randn_like(x),)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built from a copy, so that no older build/ has a part in it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-co", "--exclude-standard", "--", ":!tests", ":!reports/data"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", ".", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-w", str(folder)], cwd=source, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder bin of an environment with the wheel, before the packages of this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (packages / "zz-dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.fixture(scope="module")
def outside(
    installed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    """Runs a command of the wheel, in a folder outside of the checkout."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "small.py").write_text(SMALL_MODEL)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GIT_COMMIT")}
    environment = kept | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(words: str) -> "subprocess.CompletedProcess[str]":
        name, *rest = shlex.split(words)
        command = [str(installed / name), *rest]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)

    return run


def test_the_wheel_holds_all_packages_and_takes_no_common_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "flashjvp", "flashjvp_commands", "flashjvp_commands.pth", "tvm_ref",
    }  # fmt: skip
    for folder in ("flashjvp", "flashjvp_commands", "tvm_ref", "verify", "bench", "reports"):
        home = "" if folder.startswith(("flashjvp", "tvm")) else "flashjvp_commands/tools/"
        missing = {f"{home}{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")} - {*names}
        assert not missing
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    said = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert all(f"{name} = " in said for name in ENTRY_POINTS)


@pytest.mark.slow
def test_the_environment_does_not_see_the_checkout(
    outside: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = outside("python -c 'import flashjvp, verify, bench, reports; print(flashjvp, verify, bench, reports)'")
    assert done.returncode == 0 and done.stdout.count("site-packages") == 4 and str(ROOT) not in done.stdout, done


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENTRY_POINTS, *MODULES])
def test_help(name: str, outside: Callable[[str], "subprocess.CompletedProcess[str]"]) -> None:
    words = name if name in ENTRY_POINTS else f"python -m {name}"
    done = outside(f"{words} --help")
    assert done.returncode == 0 and f"usage: {words}" in done.stdout and not done.stderr, done
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_command_runs(outside: Callable[[str], "subprocess.CompletedProcess[str]"]) -> None:
    from verify.faults.fault_list import FAULTS

    fault = next(fault.name for fault in FAULTS if fault.backend == "tiled")
    for words, status, said in RUNS:
        if status == 2 and "CUDA" in said and torch.cuda.is_available():
            continue
        done = outside(words.replace("FAULT", shlex.quote(fault)))
        assert done.returncode == status, (words, done)
        assert said in " ".join((done.stdout + done.stderr).split()), (words, done)
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_other_packages_of_these_names_are_left_alone(
    installed: Path, outside: Callable[[str], "subprocess.CompletedProcess[str]"]
) -> None:
    """Somebody else's `reports` in site-packages stays what `import reports` finds, and our commands find ours."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(installed.parent)}))
    (packages / "reports").mkdir()
    (packages / "reports" / "__init__.py").write_text("OTHER = True\n")
    try:
        assert outside("python -c 'import reports; assert reports.OTHER'").returncode == 0
        for words in ("flashjvp-verify --help", "python -m verify --help", "flashjvp-bench sweep --help"):
            assert outside(words).returncode == 0
    finally:
        (packages / "reports" / "__init__.py").unlink()
        for path in sorted((packages / "reports").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (packages / "reports").rmdir()
