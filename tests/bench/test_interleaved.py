"""A call and the matrix product are timed interleaved, under the same settings, and the settings are put back."""

import csv
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import interleaved
from bench.cases import Case
from bench.measure import Latency, Work
from reports.interleaved import InterleavedTiming, interleaved_table

CPU = torch.device("cpu")


def test_calls_stand_between_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, str]] = []

    def latency(work: Work, device: torch.device) -> Latency:
        is_product = isinstance(work(), torch.Tensor)
        assert torch.are_deterministic_algorithms_enabled()
        seen.append((is_product, torch.backends.cuda.matmul.fp32_precision))
        ms = 2.0 if is_product else 4.0
        return Latency(ms, ms, ms, 1)

    monkeypatch.setattr(interleaved, "latency", latency)
    monkeypatch.setattr(interleaved, "CEILING_SIZE", {"cpu": 8})
    before = torch.backends.cuda.matmul.fp32_precision
    timing = interleaved.measured("flashjvp", interleaved.case_of((1, 2, 16, 8), "bwd", dtype="float32"), True, CPU)
    assert seen == [(True, "tf32")] + [(False, "tf32"), (True, "tf32")] * interleaved.ROUNDS
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert timing.latency_ms == 4.0
    assert timing.tflops == pytest.approx(30 * 2 * 16 * 16 * 8 / 4e9)
    assert timing.product_tflops == pytest.approx(2 * 8**3 / 2e9)
    assert timing.of_ceiling == pytest.approx(timing.tflops / timing.product_tflops)


def test_what_is_measured() -> None:
    plan = list(interleaved.plan())
    assert len({(provider, case, deterministic) for provider, case, deterministic in plan}) == len(plan)
    for shape in interleaved.SHAPES:
        for mode in ("fwd", "bwd"):
            assert ("flashjvp", interleaved.case_of(shape, mode), False) in plan


def timing_of(case: Case, deterministic: bool) -> InterleavedTiming:
    return InterleavedTiming(
        provider="flashjvp", mode=case.mode, batch=case.batch, heads=case.heads, kv_heads=case.kv_heads,
        queries=case.queries, head_dim=case.head_dim, mask=case.mask, dtype=case.dtype,
        products="tf32" if case.dtype == "float32" else "ieee", deterministic=deterministic, latency_ms=2.0,
        tflops=300.0, product_tflops=600.0, of_ceiling=0.5, machine="GPU", torch_version="2", triton_version="3",
        commit="0000000",
    )  # fmt: skip


def test_a_table_tells_the_calls_of_the_plan_apart() -> None:
    timings = [timing_of(case, ordered) for provider, case, ordered in interleaved.plan() if provider == "flashjvp"]
    table = interleaved_table(pd.DataFrame(timings))
    assert len({tuple(line.split("|")[1:3]) for line in table.splitlines() if "flashjvp" in line}) == len(timings)
    for call in ("bwd, deterministic", "fwd, 8 key heads", "bwd, float16", "plain-bwd, bool mask", "fwd, TF32"):
        assert f"| {call} |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no GPU")
def test_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        interleaved.main(["--out", str(tmp_path / "interleaved.csv")])
    assert "expected a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "interleaved.csv").exists()


@pytest.mark.gpu
def test_rows_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        interleaved, "plan", lambda: iter([("flashjvp", interleaved.case_of((1, 2, 256, 64), "fwd"), False)])
    )
    assert interleaved.main(["--out", str(tmp_path / "interleaved.csv")]) == 0
    (row,) = csv.DictReader((tmp_path / "interleaved.csv").open())
    assert float(row["of_ceiling"]) > 0
