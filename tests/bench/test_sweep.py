import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import sweep
from reports.environment import ROOT
from reports.schema import Row, read_rows

FAKE = """
import json, sys

task = json.loads(sys.stdin.readline())

def say(**event):
    print(json.dumps(event), flush=True)

if not task["cells"]:
    versions = dict(torch_version="2", triton_version="3", commit="abc", ceiling_tflops=CEILING, ceiling_gbs=2.0)
    where = dict(device=DEVICE, machine="Test (2 CPUs)", driver="none", threads=THREADS)
    say(event="environment", dtype=task["dtype"] or "float32", **where, **versions)
for cell in task["cells"]:
    say(event="start", id=cell["id"])
    if cell["provider"] in FAILING:
        say(event="outcome", id=cell["id"], status="error", reason="planted")
    else:
        latency = dict(latency_p20_ms=1.0, latency_p50_ms=2.0, latency_p80_ms=3.0, repeats=5)
        errors = dict(err_o=1e-7, err_o_t=1e-7, err_grad=None)
        host = dict(host_us=float(len(task["cells"])))
        say(event="outcome", id=cell["id"], status="ok", reason="", peak_mib=1.0, **latency, **errors, **host)
"""

# Leaves its process id beside the program, and hangs at the second cell.
WAIT = """import os, pathlib, time
        here = pathlib.Path(__file__).parent
        (here / f"pid-{os.getpid()}").touch()
        if len(list(here.glob("pid-*"))) == 2: time.sleep(600)"""


def fake_worker(
    tmp_path: Path, threads: int = 2, failing: tuple[str, ...] = (), device: str = "cpu", ceiling: float = 1.0
) -> tuple[str, ...]:
    """A worker that answers at once, without torch; its host_us is the number of cells that share its process."""
    path = tmp_path / f"fake_{threads}_{len(failing)}_{device}_{ceiling}.py"
    constants = f"THREADS, FAILING, DEVICE, CEILING = {threads}, {failing!r}, {device!r}, {ceiling}\n"
    path.write_text(constants + FAKE)
    return (sys.executable, str(path))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


def identity(row: Row) -> tuple[str, str, int, str]:
    return row.provider, row.mode, row.queries, row.status


def test_a_sweep_writes_a_row_a_cell_a_table_and_a_figure(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = fake_worker(tmp_path)
    assert sweep.main(["--seq", "64,128", "--out", str(out), "--causal"], worker) == 0
    rows = read_rows(out)
    assert [identity(row) for row in rows] == [
        (provider, mode, length, "ok")
        for length in (64, 128)
        for provider in ("flashjvp", "math")
        for mode in ("fwd", "fwd+bwd")
    ]
    first = rows[0]
    assert first.tflops == 6 * 64 * 64 * 64 / 2e-3 / 1e12
    assert first.inputs_mib == 6 * 64 * 64 * 4 / 2**20
    assert first.peak_ratio == (first.inputs_mib + 1.0) / first.least_mib
    assert len({row.run for row in rows}) == 1
    assert out.with_suffix(".png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "math (baseline)" in printed
    assert str(out) in printed


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


def test_a_report_has_the_rows_of_a_sweep_beside_it(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = sweep.append_row

    def both_append(path: Path, row: Row) -> None:
        append(path, row)
        append(path, dataclasses.replace(row, queries=512, keys=512))

    monkeypatch.setattr(sweep, "append_row", both_append)
    sweep.main(["--seq", "64", "--modes", "fwd", "--out", str(out)], fake_worker(tmp_path))
    printed = capsys.readouterr().out
    assert "B=1 H=1 N=512 D=64" in printed.split("attention with its JVP")[-1]


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
        f"import sys; from bench import sweep; sys.exit(sweep.main(sys.argv[1:], (sys.executable, {str(path)!r})))"
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


def test_the_exit_status_says_whether_anything_was_measured(tmp_path: Path, out: Path) -> None:
    arguments = ["--seq", "64", "--out", str(out)]
    assert sweep.main(arguments, fake_worker(tmp_path, failing=("flashjvp",))) == 0
    assert sweep.main(arguments, fake_worker(tmp_path, failing=("flashjvp", "math"))) == 1
    assert sweep.main(arguments, (sys.executable, "-c", "")) == 2
    assert sweep.main([*arguments, "--heads", "3", "--kv-heads", "2"], fake_worker(tmp_path)) == 2


def test_a_damaged_file_is_never_appended_to(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.write_text("schema_version,torn")
    for extra in ([], ["--resume"]):
        assert sweep.main(["--seq", "64", "--out", str(out), *extra], fake_worker(tmp_path)) == 2
        assert "line 1" in capsys.readouterr().out
    assert out.read_text() == "schema_version,torn"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seq", "0"],
        ["--seq", "x"],
        ["--providers", "nobody"],
        ["--modes", "backward"],
        ["--mask", "causal"],
        ["--preset", "everything"],
        ["--peer", "official"],
        ["--peer", "nobody=."],
        ["--peer", "official=/no/such/folder"],
        ["--budget-s", "0"],
        ["--dtype", "float32,int8"],
        ["--device", "mps"],
        ["--heads", "-1"],
    ],
)
def test_a_bad_command_line_ends_before_anything_runs(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep.main(arguments, ("/nonexistent",))
    assert caught.value.code == 2


def test_on_a_gpu_the_shapes_of_a_provider_and_head_dim_share_a_process(tmp_path: Path, out: Path) -> None:
    arguments = ["--seq", "64,128", "--head-dim", "32,64", "--modes", "fwd", "--out", str(out)]
    assert sweep.main(arguments, fake_worker(tmp_path, device="cuda")) == 0
    rows = read_rows(out)
    assert [(row.provider, row.head_dim, row.queries) for row in rows] == [
        (provider, head_dim, length)
        for provider in ("flashjvp", "math")
        for head_dim in (32, 64)
        for length in (64, 128)
    ]
    assert {row.host_us for row in rows} == {2.0}


@pytest.mark.parametrize(("device", "begun"), [("cuda", [0, 2, 8]), ("cpu", [*range(12)])])
def test_on_a_gpu_a_process_starts_beside_the_last_cells_of_the_one_before(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, device: str, begun: list[int]
) -> None:
    """Two providers with six cells each: after how many rows each process starts; the last one is for no cells."""
    starts: list[int] = []
    start = sweep.isolate._Child.__init__

    def seen(self: Any, *args: Any) -> None:
        starts.append(len(read_rows(out)) if out.exists() else 0)
        start(self, *args)

    monkeypatch.setattr(sweep.isolate._Child, "__init__", seen)
    arguments = ["--preset", "paper", "--seq", "128,256", "--heads", "1", "--providers", "flashjvp,math"]
    arguments += ["--modes", "fwd,bwd,fwd+bwd", "--dtype", "bfloat16", "--out", str(out)]
    assert sweep.main(arguments, fake_worker(tmp_path, device=device)) == 0
    assert len(read_rows(out)) == 12
    assert starts[1:] == begun  # the first one is for the environment


def test_what_compiles_does_so_before_anything_is_measured(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[list[list[dict[str, Any]]], str, float]] = []

    def side_by_side(tasks: list[list[dict[str, Any]]], device: str, limit_s: float, worker: object) -> None:
        assert not out.exists()
        given.append((tasks, device, limit_s))

    monkeypatch.setattr(sweep.isolate, "side_by_side", side_by_side)
    arguments = ["--preset", "paper", "--seq", "128,4096", "--providers", "math,rcm", "--out", str(out)]
    arguments += ["--peer", f"rcm={tmp_path}"]
    assert sweep.main([*arguments, "--compile-s", "30"], fake_worker(tmp_path, device="cuda")) == 0
    ((tasks, device, limit_s),) = given
    assert (device, limit_s) == ("cuda", 30.0)
    called = [(x["provider"], x["paths"], x["case"]["heads"], x["case"]["queries"]) for part in tasks for x in part]
    rcm = ("rcm", [str(tmp_path)])
    shapes = [(heads, length) for length in (128, 256, 4096) for heads in ((1, 2, 24) if length == 128 else (1, 2))]
    assert sorted(called) == sorted((*rcm, 24 if (heads, length) == (2, 4096) else heads, length)
                                    for heads, length in shapes)  # fmt: skip
    assert len({row.provider for row in read_rows(out)}) == 2
    sweep.main(["--seq", "64", "--compile-s", "30", "--out", str(tmp_path / "cpu.csv")], fake_worker(tmp_path))
    assert len(given) == 1  # on a CPU each cell has its own process and compiles nothing


def test_every_dtype_has_its_own_ceiling_measured(tmp_path: Path, out: Path) -> None:
    arguments = ["--seq", "64", "--dtype", "float32,float64", "--modes", "fwd", "--out", str(out)]
    assert sweep.main(arguments, fake_worker(tmp_path)) == 0
    assert [row.dtype for row in read_rows(out)] == ["float32"] * 2 + ["float64"] * 2


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


def test_the_default_file_is_the_machine_s_own() -> None:
    columns = {
        "device": "cuda",
        "driver": "1",
        "threads": 1,
        "torch_version": "2",
        "triton_version": "3",
        "commit": "a",
    }
    environment = sweep.Environment(machine="NVIDIA H200", ceiling_tflops=1.0, ceiling_gbs=1.0, **columns)  # type: ignore[arg-type]
    path = sweep.default_path(environment, "2025-01-01T10:20:30Z", False)
    assert path.parts[-4:] == ("reports", "data", "nvidia-h200", "sweep-2025-01-01t10-20-30z.csv")
