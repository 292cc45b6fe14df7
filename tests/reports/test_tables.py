"""A table of a sweep: a line a shape and mode, a column a provider, what failed, and the command that measured it."""

from dataclasses import replace
from typing import Any

from bench.options import parser
from reports.tables import command, sweep_table
from tests.reports.pages import cells, rows_of
from tests.reports.test_schema import FAILED, make_row


def test_a_table_has_a_line_a_shape_and_mode_and_a_column_a_provider() -> None:
    found = cells(sweep_table(rows_of(), rows_of()))
    assert found[0] == ["N", "", "flashjvp", "PyTorch math"]
    assert [line[:2] for line in found[1:]] == [
        [length, mode] for length in ("256", "1024") for mode in ("forward + JVP", "forward + JVP + backward")
    ]
    for line in found[1:]:
        assert line[2:] == ["**2.00 ms**, 300 TFLOP/s, 12.0 MiB", "7.00 ms (3.5\N{MULTIPLICATION SIGN}), 12.0 MiB"]


def test_a_failure_is_its_status_with_its_reason_below() -> None:
    rows = rows_of()
    shape: Any = {"heads": 4, "kv_heads": 4, "causal": False, "queries": 256, "keys": 256, **FAILED}
    rows.append(make_row(provider="rcm", mode="fwd", status="unsupported", reason="no | gradient", **shape))
    rows.append(make_row(provider="rcm", mode="fwd+bwd", status="crashed", reason="signal 11", **shape))
    rows.append(make_row(provider="official", mode="fwd", status="oom", reason="17 GiB", **shape))
    table = sweep_table(rows, rows)
    found = cells(table)
    assert found[0][-2:] == ["official (TVM)", "rCM"]
    assert [line[-2:] for line in found[1:]] == [["oom", "unsupported"], ["", "crashed"], ["", ""], ["", ""]]
    assert r"- rCM, forward + JVP: unsupported, no \| gradient" in table
    assert "17 GiB" not in table
    assert "an empty cell: no row" in table and "an empty cell" not in sweep_table(rows_of(), rows_of())


def test_a_provider_that_is_unsupported_in_all_rows_is_named_with_its_reasons_below() -> None:
    rows = rows_of()
    for length in (256, 1024):
        shape: Any = {"heads": 4, "kv_heads": 4, "causal": False, "queries": length, "keys": length, **FAILED}
        for provider, mode, reason in (("rcm", "fwd", "no | tangent"), ("math", "plain-fwd", f"not at {length}")):
            rows.append(make_row(provider=provider, mode=mode, status="unsupported", reason=reason, **shape))
    table = sweep_table(rows, rows)
    assert cells(table)[0] == ["N", "", "flashjvp", "PyTorch math"]
    said = "rCM (no \\| tangent), PyTorch math without JVP (not at 256; not at 1024)."
    assert f"\n\nWithout a column, since unsupported in all of these rows: {said}\n\n" in table
    assert "\n- " not in table
    assert "Without a column" not in sweep_table(rows_of(), rows_of())


def test_partial_modes_stand_beside_the_whole_ones_and_say_so() -> None:
    shape: Any = {"heads": 4, "kv_heads": 4, "causal": False, "queries": 256, "keys": 256}
    rows = [
        *rows_of(),
        make_row(provider="plain", mode="plain-fwd", latency_p50_ms=0.5, **shape),
        make_row(provider="flashjvp", mode="plain-fwd", latency_p50_ms=0.6, **shape),
        make_row(provider="finite-difference", mode="approx-fwd", latency_p50_ms=3.0, **shape),
    ]
    table = sweep_table(rows, rows)
    found = {name: cell for name, cell in zip(*cells(table)[:2], strict=True)}
    assert found["SDPA without JVP"] == "0.500 ms, 12.0 MiB"  # no ratio: it does less
    assert found["flashjvp without JVP"] == "0.600 ms, 12.0 MiB"
    assert found["finite difference"].startswith("3.00 ms (1.50")
    assert "neither tangents" in table and "approximates" in table


def test_below_a_table_stand_machine_commit_ceiling_and_command() -> None:
    rows = rows_of(preset="paper")
    table = sweep_table(rows[:1], rows)
    for said in (
        "NVIDIA H200",
        "bfloat16",
        "N=1024",
        "driver 580.1",
        "commit 0123abc-dirty",
        "700 TFLOP/s",
        "4200 GB/s",
    ):
        assert said in table
    assert "`python -m bench.sweep --preset paper --providers flashjvp,math`" in table


def test_every_start_of_a_resumed_run_has_its_ceiling() -> None:
    rows = [replace(row, ceiling_tflops=rate) for row, rate in zip(rows_of(), (705.0, 698.0, 700.0), strict=False)]
    assert "a matrix product ran at 698 to 705 TFLOP/s and a copy" in sweep_table(rows, rows)
    other = replace(rows[0], dtype="float32", ceiling_tflops=350.0)
    assert "698 to 705 TFLOP/s (bfloat16) and 350 TFLOP/s (float32)" in sweep_table([*rows, other], [*rows, other])


def test_the_command_names_every_shape_and_peer() -> None:
    rows = rows_of(causal=True, kv_heads=2)
    rows.append(make_row(provider="rcm"))
    assert command(rows) == (
        "python -m bench.sweep --seq 1024,256,8192 --batch 1 --heads 4 --kv-heads 2 --head-dim 64 --dtype bfloat16 "
        "--causal --modes fwd+bwd,fwd --providers flashjvp,math,rcm --peer rcm=PATH"
    )


def test_the_command_of_a_build_is_understood_by_the_sweep() -> None:
    rows = [*rows_of(), make_row(provider="plain", mode="plain-bwd"), make_row(provider="flashjvp", mode="plain-fwd")]
    options = parser().parse_args(command(rows).split()[3:])
    assert options.seq == [1024, 256, 8192]
    assert list(options.modes) == ["fwd+bwd", "fwd", "bwd", "plain-fwd"]
    assert list(options.providers) == ["flashjvp", "math", "plain"]
