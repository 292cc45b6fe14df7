"""Parts of a call's host time: what is counted as PyTorch's own does what the call does, and each row is a part."""

import csv
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import host
from bench.cases import make_inputs, require_gradients
from bench.interleaved import case_of
from bench.measure import host_samples_us
from reports.host_times import HOST_COLUMNS, host_table

CPU = torch.device("cpu")
SHAPE = (1, 2, 16, 8)


@pytest.mark.parametrize(("mode", "gradients"), [("bwd", 6), ("plain-bwd", 3)])
def test_an_empty_backward_gives_as_many_gradients(mode: str, gradients: int) -> None:
    inputs = make_inputs(case_of(SHAPE, mode, dtype="float32"), CPU)
    require_gradients(inputs)
    empty = host._empty(mode, inputs)
    assert empty is not None
    outputs = empty.prepare()
    assert len(outputs) == gradients // 3 and all(x.requires_grad for x in outputs)
    found = empty.run(outputs)
    assert isinstance(found, tuple) and len(found) == gradients
    alone = host._in_one_thread(empty)()
    assert isinstance(alone, tuple) and len(alone) == gradients
    assert len(host_samples_us(empty, CPU, 2)) == 2


def test_an_empty_forward() -> None:
    inputs = make_inputs(case_of(SHAPE, "fwd", dtype="float32"), CPU)
    assert host._empty("fwd", inputs) is None
    under = host._empty("func.jvp", inputs)
    assert under is not None and inputs.q_t is not None
    duals = under()
    assert isinstance(duals, tuple)
    q, q_t = duals
    assert torch.equal(q, inputs.q) and torch.equal(q_t, inputs.q_t)
    require_gradients(inputs)
    recorded = host._empty("fwd, node", inputs)
    assert recorded is not None
    results = recorded()
    assert isinstance(results, tuple)
    o, o_t = results
    assert o.grad_fn is o_t.grad_fn is not None


def test_a_chain_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LAYERS", 3)
    case = case_of(SHAPE, "bwd", dtype="float32")
    found = {part: (count, run) for part, count, run in host.parts(host.CHAINED, case, CPU)}
    assert {*found} == {"all", "one thread", "empty", "empty, one thread"}
    for count, run in found.values():
        gradients = run()
        assert count == 3 and isinstance(gradients, tuple) and len(gradients) == 2 + 3 * 4
    times = iter([3e-3] * 1000)
    monkeypatch.setattr(host, "host_samples_us", lambda run, device, batches: [next(times)])
    assert {row.p50_us for row in host.measured(host.CHAINED, case, CPU)} == {1e-3}


def test_table() -> None:
    common = {name: 1 for name in HOST_COLUMNS} | {"call": "bwd", "dtype": "bfloat16", "machine": "GPU", "host": "CPU"}
    times = {"all": 200.4, "one thread": 90.4, "empty": 100.4, "empty, one thread": 60.4}
    times |= {"buffers": 20.4, "launches": 40.4, "driver": 30.4}
    rows = [
        common | {"mask": mask, "part": part, "p50_us": us, "count": 4, "device_us": 300.4 if part == "all" else None}
        for mask in ("none", "bool")
        for part, us in times.items()
    ]
    lines = host_table(pd.DataFrame(rows)).split("\n")
    assert lines[2] == "| bwd | 200 | 100 | 90 / 60 | 20 | 40 (30), 4 | 300 | 1 |"
    assert lines[3].startswith("| bwd, bool mask | 200 |")
    assert lines[-1].startswith("B, H, N, D = 1, 1, 1, 1, bfloat16; GPU, CPU;")
    longer = pd.DataFrame([*rows, rows[0] | {"call": "fwd", "queries": 7}])
    assert host_table(longer).split("\n")[4].startswith("| fwd (1, 1, 7, 1) |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no GPU")
def test_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main(["--out", str(tmp_path / "host.csv")])
    assert "expected a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "host.csv").exists()


def test_refuses_what_is_no_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main(["--out", str(tmp_path / "host.csv"), "--shape", "1,2,3"])
    assert "expected four sizes B,H,N,D, got '1,2,3'" in capsys.readouterr().err


@pytest.mark.gpu
def test_parts_of_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BATCHES", 5)
    assert host.main(["--out", str(tmp_path / "host.csv"), "--shape", "1,2,256,64"]) == 0
    rows = list(csv.DictReader((tmp_path / "host.csv").open()))
    found = {(row["call"], row["mask"], row["part"]): row for row in rows}
    assert {key[:2] for key in found} == {(call, mask) for call, _, mask in host.PLAN}
    assert all(float(row["p50_us"]) > 0 for row in rows)
    whole = [row for row in rows if row["part"] == "all" and row["call"] != host.CHAINED]
    assert all(float(row["device_us"]) > 0 and float(row["latency_us"]) > 0 for row in whole)
    launches = {key[:2]: int(row["count"]) for key, row in found.items() if key[2] == "launches"}
    assert launches["fwd", "none"] == 1 and launches["plain-bwd", "none"] >= 2
    for call in ("fwd", "bwd", "plain-fwd", "plain-bwd"):  # a mask is packed first
        assert launches[call, "bool"] > launches[call, "none"]
