"""Every command says in one line what is wrong with its arguments, with an exit status, and writes nothing."""

import dataclasses
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashjvp_commands.ending import status_of
from tests.flashjvp_commands.bad_inputs import ROWS
from tests.tvm_ref.runs import digits, toy, train
from tvm_ref.training.config import EmaConfig

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_a_hundred_rows_over_all_commands() -> None:
    assert len(ROWS) >= 100
    assert len({module for module, *_ in ROWS}) >= 19


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("places")
    text, fifo, loop, link = (folder / f"{name}.csv" for name in ("text", "fifo", "loop", "link"))
    text.write_text("not,ours\n")
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    link.symlink_to(text)
    points, numbers = toy(folder / "points", steps=2), digits(folder / "digits", steps=2)
    train(dataclasses.replace(points, ema=EmaConfig(sigma_rels=(0.05, 0.1), every=1)))
    train(numbers)
    runs = {"points": folder / "points", "digits": folder / "digits"}
    return runs | {"text": text, "fifo": fifo, "loop": loop, "link": link, "null": "\0", "long": folder / ("x" * 300)}


def contents(places: dict[str, Any]) -> dict[Path, bytes]:
    """All files of the runs, and the file that is someone else's."""
    files = (file for run in ("points", "digits") for file in places[run].rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in (*files, places["text"])}


@pytest.mark.timeout(120)
@pytest.mark.sampled(of=5)
@pytest.mark.parametrize(("module", "words", "status", "said"), ROWS)
def test_a_bad_input_is_said_in_a_line_and_nothing_is_written(
    module: str, words: str, status: int, said: str, places: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command: Any = importlib.import_module(module)
    arguments = [word.format(here=tmp_path, **places) for word in shlex.split(words)]
    before = contents(places)
    found = status_of(lambda: command.main(arguments))
    captured = capsys.readouterr()
    shown = (captured.out + captured.err).strip()
    assert (found, "Traceback" in shown) == (status, False), shown
    assert said in " ".join(shown.split())
    assert shown and ("\n" not in shown or module == "bench.__main__"), shown
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    assert written == [] and contents(places) == before


@pytest.mark.parametrize("option", ["resume", "init"])
def test_a_start_that_is_not_there_leaves_no_folder(option: str, tmp_path: Path) -> None:
    command: Any = importlib.import_module("tvm_ref.train")
    words = ["toy2d", "--run.out", str(tmp_path / "run"), f"--run.{option}", str(tmp_path / "none")]
    assert status_of(lambda: command.main(words)) == 1
    assert list(tmp_path.iterdir()) == []


# The shortest that each command prints.
PRINTED = {
    "flashjvp": "", "verify": "--help", "verify model": "--help", "bench": "--help", "bench.tune": "--help",
    "tvm_ref.train": "--help", "tvm_ref.evaluate": "--help", "tvm_ref.convert": "--help", "reports.api": "--check",
    "flashjvp.check": "--help",
}  # fmt: skip
# How standard output can fail, and the exit statuses then. Where nothing was printed, nothing failed.
FAILING = {"> /dev/full": (1,), ">&-": (0,), "2>&-": (0,), "| true; exit ${PIPESTATUS[0]}": (0, 141), "<&-": (0,)}


@pytest.mark.sampled(of=16)
@pytest.mark.parametrize("how", FAILING)
@pytest.mark.parametrize("name", PRINTED)
def test_a_standard_output_that_takes_nothing(name: str, how: str) -> None:
    script = f"{sys.executable} -m {name} {PRINTED[name]} {how}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    silent = name == "reports.api"
    assert done.returncode in (0, 1) if silent else done.returncode in FAILING[how], done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr
