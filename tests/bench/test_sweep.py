import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import isolate, sweep
from bench.cases import Case
from bench.providers import PROVIDERS
from bench.table import table
from reports.schema import Row, read_rows
from tests.bench import planted
from tests.reports.test_schema import FAILED, make_row

FAKE = """
import json, sys

task = json.loads(sys.stdin.readline())

def say(**event):
    print(json.dumps(event), flush=True)

if not task["cells"]:
    versions = dict(torch_version="2", triton_version="3", commit="abc", ceiling_tflops=1.0)
    say(event="environment", device="cpu", machine="Test (2 CPUs)", driver="none", threads=THREADS, **versions)
for cell in task["cells"]:
    say(event="start", id=cell["id"])
    if cell["provider"] in FAILING:
        say(event="outcome", id=cell["id"], status="error", reason="planted")
    else:
        latency = dict(latency_p20_ms=1.0, latency_p50_ms=2.0, latency_p80_ms=3.0, repeats=5)
        errors = dict(err_o=1e-7, err_o_t=1e-7, err_grad=None)
        say(event="outcome", id=cell["id"], status="ok", reason="", peak_mib=1.0, **latency, **errors)
"""


def fake_worker(tmp_path: Path, threads: int = 2, failing: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A worker that answers at once, without torch."""
    path = tmp_path / f"fake_{threads}_{len(failing)}.py"
    path.write_text(f"THREADS, FAILING = {threads}, {failing!r}\n{FAKE}")
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


def test_resume_in_another_environment_starts_a_new_run(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--seq", "64", "--modes", "fwd", "--out", str(out), "--resume"]
    times = iter(f"2025-01-01T00:00:{second:02}Z" for second in range(60))
    monkeypatch.setattr(sweep, "_now", lambda: next(times))
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


def test_the_exit_status_says_whether_anything_was_measured(tmp_path: Path, out: Path) -> None:
    arguments = ["--seq", "64", "--out", str(out)]
    assert sweep.main(arguments, fake_worker(tmp_path, failing=("flashjvp",))) == 0
    assert sweep.main(arguments, fake_worker(tmp_path, failing=("flashjvp", "math"))) == 1
    assert sweep.main(arguments, (sys.executable, "-c", "")) == 2
    assert sweep.main([*arguments, "--heads", "3", "--kv-heads", "2"], fake_worker(tmp_path)) == 2


def test_a_damaged_file_is_never_appended_to(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.write_text("schema_version,torn")
    for options in ([], ["--resume"]):
        assert sweep.main(["--seq", "64", "--out", str(out), *options], fake_worker(tmp_path)) == 2
        assert "line 1" in capsys.readouterr().out
    assert out.read_text() == "schema_version,torn"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seq", "0"],
        ["--seq", "x"],
        ["--providers", "nobody"],
        ["--modes", "bwd"],
        ["--dtype", "int8"],
        ["--device", "mps"],
        ["--heads", "-1"],
    ],
)
def test_a_bad_command_line_ends_before_anything_runs(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep.main(arguments, ("/nonexistent",))
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("device", "heads", "head_dim", "dtype"), [("cpu", 1, 64, "float32"), ("cuda", 24, 128, "bfloat16")]
)
def test_defaults_fit_the_device(device: str, heads: int, head_dim: int, dtype: str) -> None:
    cells = sweep.make_cells(sweep.parser().parse_args(["--seq", "8192"]), device)
    assert [(cell.provider, cell.case.mode) for cell in cells] == [
        ("flashjvp", "fwd"),
        ("flashjvp", "fwd+bwd"),
        ("math", "fwd"),
        ("math", "fwd+bwd"),
    ]
    expected = {"batch": 1, "heads": heads, "kv_heads": heads, "queries": 8192, "keys": 8192, "head_dim": head_dim}
    case = Case(mode="fwd", dtype=dtype, causal=False, **expected)
    assert cells[0].case == case


def test_real_workers_survive_planted_faults(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sweep over an out-of-memory, a crash and a good provider, each in a process of its own."""
    monkeypatch.setattr(sweep, "PROVIDERS", PROVIDERS | planted.PLANTED)
    names = "planted-oom,planted-crash,flashjvp"
    arguments = ["--seq", "64", "--modes", "fwd", "--device", "cpu", "--providers", names, "--out", str(out)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sweep.main(arguments, planted.WORKER) == 0
    rows = read_rows(out)
    assert [(row.provider, row.status) for row in rows] == [
        ("planted-oom", "oom"),
        ("planted-crash", "crashed"),
        ("flashjvp", "ok"),
    ]
    assert rows[0].reason.startswith("cannot allocate ")
    assert "SIGSEGV" in rows[1].reason
    good = rows[2]
    assert good.device == "cpu"
    assert good.threads == 1
    assert good.ceiling_tflops > 0
    assert (good.latency_p20_ms or 0) <= (good.latency_p50_ms or 0) <= (good.latency_p80_ms or 0)
    assert good.err_o is not None and good.err_o_t is not None and good.err_grad is None
    assert "oom: cannot allocate " in capsys.readouterr().out


def test_one_worker_goes_on_after_what_cannot_have_damaged_it() -> None:
    case = {
        **{"mode": "fwd", "batch": 1, "heads": 2, "kv_heads": 1, "queries": 33, "keys": 33, "head_dim": 16},
        **{"dtype": "float32", "causal": True, "mask": "none"},
    }
    names = ["planted-gpu-only", "planted-not-implemented", "planted-wrong", "planted-prints", "planted-raise", "math"]
    cells = [{"id": i, "provider": name, "case": case} for i, name in enumerate(names)]
    found = {
        cell["provider"]: (outcome["status"], outcome["reason"])
        for cell, outcome in isolate.outcomes(cells, "cpu", 120.0, lambda _: None, planted.WORKER)
    }
    assert list(found) == names
    assert [status for status, _ in found.values()] == ["unsupported", "unsupported", "wrong", "ok", "error", "ok"]
    assert found["planted-gpu-only"][1] == "planted-gpu-only runs on cuda, not on cpu"
    assert found["planted-not-implemented"][1] == "NotImplementedError: no such kernel"
    assert found["planted-wrong"][1].startswith("o_t 1.00e+00 (budget ")
    assert found["planted-raise"][1] == "ValueError: planted over two lines"


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", ""),
        ({}, "mps", "runs on cpu and cuda, not on mps"),
        ({"dtype": "float64"}, "cpu", "takes float16, float32, not float64"),
        ({"causal": True}, "cpu", "has no causal mask"),
        ({"kv_heads": 1}, "cpu", "as many key heads"),
        ({"mode": "fwd+bwd"}, "cpu", "has no mode fwd+bwd"),
    ],
)
def test_a_provider_says_what_it_cannot_do(changes: dict[str, Any], device: str, reason: str) -> None:
    peer = planted.providers.Provider(
        name="peer", load=lambda: planted.right, dtypes=("float16", "float32"), causal=False, gqa=False, modes=("fwd",)
    )
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 8, "keys": 8, "head_dim": 8}
    case = Case(**{"mode": "fwd", "dtype": "float32", "causal": False, **sizes, **changes})
    assert reason in peer.why_not(case, device)
    assert bool(peer.why_not(case, device)) == bool(reason)


def test_the_table_compares_with_the_baseline_of_the_same_shape() -> None:
    rows = [
        make_row(provider="math", latency_p50_ms=10.0, peak_mib=100.0),
        make_row(provider="flashjvp", latency_p50_ms=4.0, peak_mib=10.0),
        make_row(provider="flashjvp", queries=64, keys=64, latency_p50_ms=1.0),
        make_row(provider="math", queries=64, keys=64, status="oom", reason="too large for it", **FAILED),
    ]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(rows))
    lines = [line for line in console.export_text().splitlines() if "flashjvp" in line or "math (" in line]
    assert "1x" in lines[0] and "math (baseline)" in lines[0]
    assert "2.5x" in lines[1] and "10x" in lines[1]
    assert "x" not in lines[2].replace("flashjvp", "")
    assert "oom" in lines[3] and "too large for it" in lines[3]


def test_the_default_file_is_the_machine_s_own() -> None:
    columns = {
        "device": "cuda",
        "driver": "1",
        "threads": 1,
        "torch_version": "2",
        "triton_version": "3",
        "commit": "a",
    }
    environment = sweep.Environment(machine="NVIDIA H200", ceiling_tflops=1.0, **columns)  # type: ignore[arg-type]
    path = sweep.default_path(environment, "2025-01-01T10:20:30Z", False)
    assert path.parts[-4:] == ("reports", "data", "nvidia-h200", "sweep-2025-01-01t10-20-30z.csv")
