"""A sweep that ended early goes on where it stopped, and never mixes two environments in one run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import sweep
from reports.environment import ROOT
from reports.schema import Row, read_rows
from tests.bench.fake_worker import fake_worker, identity

# Leaves its process id beside the program, and hangs at the second cell.
WAIT = """import os, pathlib, time
        here = pathlib.Path(__file__).parent
        (here / f"pid-{os.getpid()}").touch()
        if len(list(here.glob("pid-*"))) == 2: time.sleep(600)"""


def test_resume_measures_only_what_is_missing(tmp_path: Path, out: Path) -> None:
    worker = fake_worker(tmp_path)
    sweep.main(["--seq", "64", "--modes", "fwd", "--out", str(out)], worker)
    before = read_rows(out)
    sweep.main(["--seq", "64", "--out", str(out), "--resume"], worker)
    rows = read_rows(out)
    assert rows[: len(before)] == before
    assert [identity(row)[:2] for row in rows[len(before) :]] == [("flashjvp", "fwd+bwd"), ("math", "fwd+bwd")]
    assert len({row.run for row in rows}) == 1


def test_sweeps_of_other_sizes_go_on_with_one_run_side_by_side(tmp_path: Path, out: Path) -> None:
    worker = fake_worker(tmp_path)
    sweep.main(["--seq", "64", "--modes", "fwd", "--providers", "flashjvp", "--out", str(out)], worker)
    code = "import sys; from bench import sweep; sys.exit(sweep.main(sys.argv[2:], (sys.executable, sys.argv[1])))"
    shapes = [["--seq", length, "--heads", heads] for length, heads in (("64", "1"), ("128", "1"), ("64,128", "3"))]
    command = [sys.executable, "-c", code, worker[1], "--resume", "--out", str(out)]
    running = [subprocess.Popen([*command, *shape], cwd=ROOT, stdout=subprocess.DEVNULL) for shape in shapes]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    rows = read_rows(out)
    assert len({row.run for row in rows}) == 1
    found = [(*identity(row), row.heads) for row in rows]
    assert len(found) == len({*found}) == 2 * 2 * 4  # providers, modes, shapes
    assert {*tmp_path.glob("rows*")} == {out, out.with_suffix(".png")}


def test_resume_in_another_environment_starts_a_new_run(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--seq", "64", "--modes", "fwd", "--out", str(out), "--resume"]
    times = iter(f"2025-01-01T00:00:{second:02}Z" for second in range(60))
    monkeypatch.setattr(sweep, "now", lambda: next(times))
    sweep.main(arguments, fake_worker(tmp_path))
    sweep.main(arguments, fake_worker(tmp_path, threads=16))
    assert "another threads" in capsys.readouterr().out
    rows = read_rows(out)
    assert [row.threads for row in rows] == [2, 2, 16, 16]
    assert rows[1].run != rows[2].run


def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = sweep.append_row, 0

    def interrupted(path: Path, row: Row) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        append(path, row)

    monkeypatch.setattr(sweep, "append_row", interrupted)
    assert sweep.main(["--seq", "64", "--out", str(out)], fake_worker(tmp_path)) == 130
    assert [identity(row)[:2] for row in read_rows(out)] == [("flashjvp", "fwd")]
    assert "--resume" in capsys.readouterr().out
    assert out.with_suffix(".png").exists()


def test_ctrl_c_ends_the_sweep_and_its_worker(tmp_path: Path, out: Path) -> None:
    """A real signal, while a cell is being measured."""
    path = tmp_path / "slow.py"
    path.write_text(Path(fake_worker(tmp_path)[1]).read_text().replace("else:", f"else:\n        {WAIT}"))
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        f"from bench import sweep; sys.exit(sweep.main(sys.argv[1:], (sys.executable, {str(path)!r})))"
    )
    command = [sys.executable, "-c", program, "--seq", "64", "--modes", "fwd", "--device", "cpu", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (out.exists() and len(list(tmp_path.glob("pid-*"))) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [identity(row)[0] for row in read_rows(out)] == ["flashjvp"]
    assert "--resume continues" in printed and str(out) in printed
    workers = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_a_spent_budget_leaves_rows_for_resume(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--seq", "64", "--out", str(out), "--resume"]
    monkeypatch.setattr(sweep, "_is_over", lambda end: out.exists() and len(read_rows(out)) == 3)
    assert sweep.main([*arguments, "--budget-s", "600"], fake_worker(tmp_path)) == 0
    monkeypatch.undo()
    assert "1 of 4 rows left, which --resume measures" in capsys.readouterr().out
    assert len(read_rows(out)) == 3
    sweep.main(arguments, fake_worker(tmp_path))
    rows = read_rows(out)
    assert [identity(row)[:2] for row in rows] == [
        (provider, mode) for provider in ("flashjvp", "math") for mode in ("fwd", "fwd+bwd")
    ]
    assert len({row.run for row in rows}) == 1


def test_a_run_is_not_continued_on_another_card(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--seq", "64", "--modes", "fwd", "--out", str(out), "--resume"]
    times = iter(f"2025-01-01T00:00:{second:02}Z" for second in range(60))
    monkeypatch.setattr(sweep, "now", lambda: next(times))
    for ceiling in (1.0, 1.01, 1.2):
        sweep.main(arguments, fake_worker(tmp_path, device="cuda", ceiling=ceiling))
    assert "another card" in capsys.readouterr().out
    assert [row.ceiling_tflops for row in read_rows(out)] == [1.0, 1.0, 1.2, 1.2]
