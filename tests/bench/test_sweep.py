"""A sweep writes a row a cell, starts the processes it needs, and refuses a bad command line."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import sweep
from reports.schema import Row, read_rows
from tests.bench.fake_worker import fake_worker, identity


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


def test_where_all_providers_share_a_process_it_goes_shape_by_shape(tmp_path: Path, out: Path) -> None:
    arguments = ["--preset", "coverage", "--head-dim", "1,8"]
    assert sweep.main([*arguments, "--out", str(out)], fake_worker(tmp_path, device="cuda")) == 0
    rows = read_rows(out)
    modes = [("flashjvp", "fwd"), ("flashjvp", "bwd"), ("plain", "plain-fwd"), ("plain", "plain-bwd")]
    assert [(row.head_dim, row.provider, row.mode) for row in rows] == [(d, *x) for d in (1, 8) for x in modes]
    assert {row.host_us for row in rows} == {8.0}
    other = ["--providers", "flashjvp,math", "--modes", "fwd", "--out", str(tmp_path / "other.csv")]
    sweep.main([*arguments, *other], fake_worker(tmp_path, device="cuda"))
    rows = read_rows(tmp_path / "other.csv")
    assert [(row.provider, row.head_dim, row.host_us) for row in rows] == [
        (provider, head_dim, 1.0) for provider in ("flashjvp", "math") for head_dim in (1, 8)
    ]


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
