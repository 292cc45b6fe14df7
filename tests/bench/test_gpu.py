"""Cells on a GPU: events, the allocator's peak, and the process after an out-of-memory."""

from pathlib import Path

import pytest
import torch

from bench import sweep
from bench.cell import Cells
from reports.schema import read_rows
from tests.bench.test_cases import make_case

pytestmark = pytest.mark.gpu
SIZES = {"batch": 1, "heads": 4, "kv_heads": 4, "queries": 1024, "keys": 1024, "head_dim": 64}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *[("flashjvp", mode) for mode in ("fwd", "bwd", "fwd+bwd", "plain-fwd", "plain-bwd")],
        *[("math", mode) for mode in ("fwd", "bwd", "fwd+bwd")],
        ("flashjvp-func-jvp", "bwd"),
        ("plain", "plain-fwd"),
        ("plain-flash", "plain-fwd"),
        ("finite-difference", "approx-fwd"),
    ],
)
def test_a_provider_is_measured(name: str, mode: str) -> None:
    outcome = Cells(torch.device("cuda")).outcome(name, make_case(mode=mode, **SIZES))
    assert (outcome["status"], outcome["reason"]) == ("ok", "")
    assert 0 < outcome["latency_p20_ms"] <= outcome["latency_p50_ms"] <= outcome["latency_p80_ms"]
    assert outcome["host_us"] > 0
    outputs_mib = 2 * SIZES["heads"] * SIZES["queries"] * SIZES["head_dim"] / 2**20
    assert outcome["peak_mib"] >= outputs_mib  # at least one output or gradient in bfloat16


def test_a_process_goes_on_after_an_out_of_memory() -> None:
    cells = Cells(torch.device("cuda"))
    outcome = cells.outcome("math", make_case(mode="fwd", **(SIZES | {"queries": 2**19, "keys": 2**19})))
    assert outcome["status"] == "oom"
    assert cells.outcome("math", make_case(mode="fwd", **SIZES))["status"] == "ok"


def test_a_sweep_runs(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    arguments = ["--preset", "quick", "--seq", "128", "--providers", "flashjvp,plain", "--out", str(out)]
    assert sweep.main(arguments) == 0
    rows = read_rows(out)
    assert {row.device for row in rows} == {"cuda"}
    assert all(row.ceiling_tflops > 10 and row.ceiling_gbs > 100 for row in rows)
    assert [row.status for row in rows if row.provider == "flashjvp"] == ["ok"] * 3


def test_a_sweep_compiles_first_and_judges_long_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    shape = ["--seq", "2304", "--heads", "1", "--head-dim", "128", "--modes", "fwd,bwd"]
    assert sweep.main([*shape, "--providers", "flashjvp", "--compile-s", "120", "--out", str(out)]) == 0
    assert "compiled in " in capsys.readouterr().out
    rows = read_rows(out)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert rows[1].err_grad is not None
