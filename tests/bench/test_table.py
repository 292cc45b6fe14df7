import os

from rich.console import Console

from bench.table import table
from reports.schema import Row
from tests.reports.test_schema import FAILED, make_row


def printed(rows: list[Row]) -> list[str]:
    console = Console(width=220, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(rows))
    return console.export_text().splitlines()


def test_the_table_compares_with_the_baseline_and_flashjvp_of_the_same_shape() -> None:
    rows = [
        make_row(provider="math", latency_p50_ms=10.0, peak_mib=100.0),
        make_row(provider="flashjvp", latency_p50_ms=4.0, peak_mib=10.0),
        make_row(provider="official", latency_p50_ms=7.0, peak_mib=20.0),
        make_row(provider="flashjvp", queries=64, keys=64, latency_p50_ms=1.0),
        make_row(provider="math", queries=64, keys=64, status="oom", reason="too large for it", **FAILED),
    ]
    lines = [line for line in printed(rows) if any(f" {row.provider} " in line for row in rows) and "│" in line]
    assert "1x" in lines[0] and "2.5x" in lines[0] and "math (baseline)" in lines[0]
    assert "2.5x" in lines[1] and "10x" in lines[1] and "21.5" in lines[1]
    assert "1.43x" in lines[2] and "1.75x" in lines[2] and "5x" in lines[2]
    assert lines[3].count("x ") == 1
    assert "oom" in lines[4]


def test_reasons_stand_below_the_table_once() -> None:
    failed = {"status": "unsupported", "reason": "official has no causal mask", **FAILED}
    rows = [make_row(), *[make_row(provider="official", mode=mode, **failed) for mode in ("fwd", "bwd")]]
    lines = [line for line in printed(rows) if "has no causal mask" in line]
    assert [line.strip() for line in lines] == ["official, unsupported (2 rows): official has no causal mask"]


def test_a_wrong_row_shows_its_time_but_no_ratio() -> None:
    rows = [make_row(provider="math", status="wrong", reason="d_q nan", latency_p50_ms=10.0), make_row()]
    lines = [line for line in printed(rows) if "math (baseline)" in line or " flashjvp " in line]
    assert "wrong: 10" in "".join(lines) and "6.67x" not in "".join(lines)
