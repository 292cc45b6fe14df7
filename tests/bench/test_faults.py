"""Real workers with planted faults."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import isolate, options, sweep
from bench.options import parser
from bench.providers import PROVIDERS
from reports.schema import read_rows
from tests.bench import planted


@pytest.mark.slow
def test_real_workers_survive_planted_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sweep over an out-of-memory, a crash, a hang and a good provider, each in a process of its own."""
    out = tmp_path / "rows.csv"
    monkeypatch.setattr(sweep, "PROVIDERS", PROVIDERS | planted.PLANTED)
    monkeypatch.setattr(options, "PROVIDERS", PROVIDERS | planted.PLANTED)
    names = "planted-oom,planted-crash,flashjvp,planted-gpu-only,planted-hang"
    arguments = ["--seq", "64", "--modes", "fwd", "--device", "cpu", "--providers", names, "--out", str(out)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep.Sweep, "_measure_group", with_limit(4.0, "planted-hang"))
    assert sweep.main(arguments, planted.WORKER) == 0
    rows = read_rows(out)
    assert [(row.provider, row.status) for row in rows] == [
        ("planted-oom", "oom"),
        ("planted-crash", "crashed"),
        ("flashjvp", "ok"),
        ("planted-gpu-only", "unsupported"),
        ("planted-hang", "timeout"),
    ]
    assert rows[0].reason.startswith("cannot allocate ")
    assert "SIGSEGV" in rows[1].reason
    good = rows[2]
    assert good.device == "cpu"
    assert good.threads == 1
    assert good.ceiling_tflops > 0 and good.ceiling_gbs > 0
    assert good.host_us is not None and good.host_us > 0
    assert (good.latency_p20_ms or 0) <= (good.latency_p50_ms or 0) <= (good.latency_p80_ms or 0)
    assert good.err_o is not None and good.err_o_t is not None and good.err_grad is None
    assert "oom: cannot allocate " in capsys.readouterr().out


def with_limit(limit_s: float, provider: str) -> Any:
    """The method that measures a group, with another time limit for one provider: the others may be slow to start."""
    original = sweep.Sweep._measure_group

    def measure_group(self: sweep.Sweep, group: list[Any], *rest: Any) -> int:
        limited = replace(self, limit_s=limit_s) if group[0].provider == provider else self
        return original(limited, group, *rest)

    return measure_group


def run_cells(names: list[str], paths: Sequence[str] = ()) -> dict[str, tuple[str, str]]:
    """Status and reason of planted providers on one small case, in one worker as long as it lives."""
    case = {
        **{"mode": "fwd", "batch": 1, "heads": 2, "kv_heads": 1, "queries": 33, "keys": 33, "head_dim": 16},
        **{"dtype": "float32", "causal": True, "mask": "none"},
    }
    cells = [{"id": i, "provider": name, "case": case, "paths": list(paths)} for i, name in enumerate(names)]
    outcomes = isolate.outcomes(cells, "cpu", 120.0, lambda _: None, planted.WORKER)
    return {cell["provider"]: (outcome["status"], outcome["reason"]) for cell, outcome in outcomes}


def test_one_worker_goes_on_after_what_cannot_have_damaged_it() -> None:
    names = ["planted-not-implemented", "planted-wrong", "planted-prints", "planted-raise", "math"]
    found = run_cells(names)
    assert list(found) == names
    assert [status for status, _ in found.values()] == ["unsupported", "wrong", "ok", "error", "ok"]
    assert found["planted-not-implemented"][1] == "NotImplementedError: no such kernel"
    assert found["planted-wrong"][1].startswith("o_t 1.00e+00 (budget ")
    assert found["planted-raise"][1] == "ValueError: planted over two lines"


def test_a_worker_that_only_compiles_measures_nothing() -> None:
    case = {
        **{"mode": "fwd+bwd", "batch": 1, "heads": 1, "kv_heads": 1, "queries": 8, "keys": 8, "head_dim": 8},
        **{"dtype": "float32", "causal": False, "mask": "none"},
    }
    cells = [{"id": i, "provider": name, "case": case, "paths": []} for i, name in enumerate(("planted-raise", "math"))]
    with isolate._Child(planted.WORKER) as child:
        child.give({"device": "cpu", "cells": cells, "compile_only": True})
        events = list(iter(lambda: child.next_event(120.0), None))
    found = [event for event in events if event["event"] == "outcome"]
    reason = "ValueError: planted over two lines"
    assert found == [
        {"event": "outcome", "id": 0, "status": "error", "reason": reason},
        {"event": "outcome", "id": 1, "status": "ok", "reason": ""},
    ]


def test_a_peer_is_imported_from_its_path(tmp_path: Path) -> None:
    """A checkout, with a package that it needs beside it; the same without that package is a row that says so."""
    checkout, beside = tmp_path / "checkout", tmp_path / "beside"
    (beside / "needed").mkdir(parents=True)
    (beside / "needed" / "__init__.py").write_text("")
    checkout.mkdir()
    source = "import needed\nfrom tests.bench.planted import right as attention\n"
    (checkout / "a_peer_that_is_not_installed.py").write_text(source)
    joined = os.pathsep.join((str(checkout), str(beside)))
    name, both = parser().parse_args(["--peer", f"official={joined}"]).peers.popitem()
    assert (name, both) == ("official", [str(checkout), str(beside)])
    found = run_cells(["planted-missing"], paths=both)
    assert found["planted-missing"] == ("ok", "")
    found = run_cells(["planted-missing"], paths=both[:1])
    assert found["planted-missing"] == ("unsupported", "ModuleNotFoundError: No module named 'needed'")
