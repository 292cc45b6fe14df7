import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from bench.options import parser
from reports import build
from reports.build import BuildError
from reports.schema import COLUMNS, Row, VersionError, write_rows
from reports.tables import command, sweep_table
from reports.training_tables import DIGITS_COLUMNS, STEP_COLUMNS, TOY_COLUMNS
from reports.verification import write_verdicts
from reports.verify_plot import SWEEPS
from tests.reports.test_schema import FAILED, make_row
from tests.reports.test_verification import make_verdict

pytestmark = pytest.mark.filterwarnings("error")  # such as of a layout that does not fit
README = "# Title\n\n<!-- table: machine/sweep{} -->\n<!-- end -->\n\nText.\n"


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def rows_of(lengths: tuple[int, ...] = (1024, 256), **changes: Any) -> list[Row]:
    shape = {"heads": 4, "kv_heads": 4, "causal": False, "preset": ""} | changes
    rows = []
    for length in lengths:
        for provider, ms in (("flashjvp", 2.0), ("math", 7.0)):
            for mode in ("fwd+bwd", "fwd"):
                rows.append(
                    make_row(provider=provider, mode=mode, queries=length, keys=length, latency_p50_ms=ms, **shape)
                )
    return rows


def cells(table: str) -> list[list[str]]:
    """The cells of a markdown table, its rule left out."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # as many cells in each line
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "---" not in line]


def place(tmp_path: Path, rows: list[Row], words: str = "") -> tuple[Path, Path]:
    """A README with one mark, and the folder of its data."""
    readme, data = tmp_path / "README.md", tmp_path / "reports" / "data"
    readme.write_text(README.format(words))
    write_rows(data / "machine" / "sweep.csv", rows)
    return readme, data


@pytest.mark.parametrize("page", build.PAGES, ids=lambda page: page.stem)
def test_the_pages_of_this_repository_hold_the_tables_of_their_data(page: Path) -> None:
    assert build.BLOCK.search(page.read_text())
    assert build.render(page, build.DATA) == page.read_text(), "run python -m reports.build"


def test_figures_of_the_tables_in_the_pages_are_those_of_their_data() -> None:
    stale = build.check(build.PAGES, build.DATA, shown_only=True)
    assert not stale, "run python -m reports.build"


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


def test_a_build_fills_the_marks_and_draws_the_figures(tmp_path: Path) -> None:
    readme, data = place(tmp_path, rows_of(), " queries=1024 mode=fwd")
    assert build.check([readme], data) != []
    assert build.build([readme], data) != []
    assert build.check([readme], data) == []
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- table: machine/sweep queries=1024 mode=fwd -->\n")
    assert text.endswith("<!-- end -->\n\nText.\n")
    assert cells(text)[0] == ["", "flashjvp", "PyTorch math"]
    assert len(cells(text)) == 2
    folder = data / "machine"
    names = {"sweep.csv", *(f"sweep{x}.png" for x in ("", "-latency", "-memory", "-throughput", "-speedup"))}
    assert {path.name for path in folder.iterdir()} == names
    links = re.findall(r"\]\(reports/data/([^)]+)\)", text)
    assert {(data / link).name for link in links} == names


def test_what_does_not_fit_the_data_is_found(tmp_path: Path) -> None:
    readme, data = place(tmp_path, rows_of((256,)))
    build.build([readme], data)
    readme.write_text(readme.read_text().replace("7.00 ms", "9.00 ms"))
    (data / "machine" / "sweep-speedup.png").unlink()
    assert build.check([readme], data) == [
        "README.md: table machine/sweep is not that of its data",
        "machine/sweep-speedup.png is missing",
    ]
    write_rows(data / "machine" / "sweep.csv", rows_of((256,), commit="fedcba9"))
    assert build.check([readme], data) == [
        "README.md: table machine/sweep is not that of its data",
        "machine/sweep.png was not made by a build from sweep.csv as it is",
        "machine/sweep-speedup.png is missing",
    ]


def test_one_length_without_a_peer_is_left_to_the_table(tmp_path: Path) -> None:
    rows = [row for row in rows_of() if row.queries == 256 and row.provider == "flashjvp"]
    readme, data = place(tmp_path, rows)
    build.build([readme], data)
    assert {path.name for path in (data / "machine").iterdir()} == {"sweep.csv"}
    assert "[sweep.csv]" in readme.read_text() and "figures" not in readme.read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- table: machine/other -->\n<!-- end -->\n", "machine/other"),
        ("<!-- table: machine/sweep -->\n", "malformed"),
        ("<!-- table: machine/sweep heads 4 -->\n<!-- end -->\n", "malformed"),
        ("<!-- table: machine/sweep length=4 -->\n<!-- end -->\n", "no column 'length'"),
        ("<!-- table: machine/sweep queries=4 -->\n<!-- end -->\n", "no row with queries=4"),
    ],
)
def test_a_wrong_mark_is_an_error_that_names_it(tmp_path: Path, text: str, problem: str) -> None:
    readme, data = place(tmp_path, rows_of())
    readme.write_text(text)
    for call in (build.build, build.check):
        with pytest.raises(BuildError, match=re.escape(problem)):
            call([readme], data)
    assert readme.read_text() == text


def test_rows_of_two_runs_and_files_of_another_version_are_errors(tmp_path: Path) -> None:
    readme, data = place(tmp_path, [*rows_of(), make_row(run="2025-02-02T00:00:00Z")])
    with pytest.raises(BuildError, match="2 runs"):
        build.build([readme], data)
    write_rows(data / "machine" / "sweep.csv", [])
    with pytest.raises(BuildError, match="no row"):
        build.build([readme], data)
    (data / "machine" / "sweep.csv").write_text(",".join(COLUMNS[:-1]) + "\n1,now\n")
    with pytest.raises(VersionError):
        build.build([readme], data)


def test_the_command_writes_checks_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, data = place(tmp_path, rows_of((256,)))
    monkeypatch.setattr(build, "PAGES", (readme,))
    monkeypatch.setattr(build, "DATA", data)
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    readme.write_text("<!-- table: machine/other -->\n<!-- end -->\n")
    assert build.main([]) == 2
    assert "machine/other" in capsys.readouterr().err


def test_a_verification_has_a_table_of_errors(tmp_path: Path) -> None:
    readme, data = place(tmp_path, rows_of((256,)))
    rows = [
        make_verdict(
            group="others", backend=backend, dtype=dtype, quantity=quantity, error=error, budget=4 * error, ok=ok
        )
        for backend, dtype, ok in (("triton", "bfloat16", False), ("tiled", "float32", True))
        for quantity, error in (("o", 1e-3), ("o_t", 2e-3), ("d_q", 3e-3), ("d_k_t", 5e-3))
    ]
    rows.append(make_verdict(backend="tiled", check="adjoint", error=0.5, budget=None, ratio_to_dense=None))
    write_verdicts(data / "machine" / "verify.csv.gz", rows)
    readme.write_text("<!-- table: machine/verify -->\n<!-- end -->\n")
    build.build([readme], data)
    found = cells(readme.read_text())
    assert found[1] == ["tiled", "float32", "1.0e-03", "2.0e-03", "4.0e-03", "1.00", "0.25", "5", "0"]
    assert found[2][-2:] == ["4", "4"]
    assert "python -m verify" in readme.read_text()
    assert (data / "machine" / "sweep.png").exists()
    assert not list((data / "machine").glob("verify*.png"))
    write_verdicts(data / "machine" / "verify.csv.gz", [make_verdict(group=SWEEPS[0].group)])
    build.build([readme], data)
    assert [path.name for path in (data / "machine").glob("verify*.png")] == ["verify-length.png"]
    assert build.check([readme], data) == []


def place_table(tmp_path: Path, lines: list[str]) -> tuple[Path, Path]:
    """A page in a folder of its own with one mark, and the folder of its data."""
    page, csv = tmp_path / "docs" / "page.md", tmp_path / "reports" / "data" / "machine" / "rows.csv"
    for path in (page, csv):
        path.parent.mkdir(parents=True)
    page.write_text("<!-- table: machine/rows -->\n<!-- end -->\n")
    csv.write_text("\n".join(lines) + "\n")
    return page, csv.parent.parent


def test_the_quality_of_digits_has_a_line_for_each_number_of_evaluations(tmp_path: Path) -> None:
    run = "1797,{},{},0.99,0.01,0.02,0.03,131.4,124.5,a CPU,2.13,0123456"
    lines = [f"digits,576,7,{nfe},{run.format(*found)}" for nfe, found in ((1, (0.97449, 0.2996)), (4, (1.0, 0.2)))]
    page, data = place_table(tmp_path, [",".join(DIGITS_COLUMNS), *lines])
    build.build([page], data)
    assert cells(page.read_text())[1:] == [["1", "97.4%", "0.300"], ["4", "100.0%", "0.200"]]
    for said in (
        "a CPU; torch 2.13, commit 0123456", "--run.seed 7`: 576 steps, then 1797 samples, in 131 s (124 s of",
        "Cycle error: 0.010 from t = 0.25, 0.020 from t = 0.5, 0.030 from t = 1;", "99.0% of the",
    ):  # fmt: skip
        assert said in page.read_text()
    (link,) = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert (page.parent / link).is_file()


def test_the_quality_of_points_stands_beside_that_of_fresh_ones(tmp_path: Path) -> None:
    lines = [
        f"toy2d,1050,7,{nfe},2048,{w2},0.15886,0.1,0.2,0.3,61,56,a CPU,2.13,0123456"
        for nfe, w2 in ((1, 0.30041), (4, 0.2))
    ]
    page, data = place_table(tmp_path, [",".join(TOY_COLUMNS), *lines])
    build.build([page], data)
    assert cells(page.read_text())[1:] == [["1", "0.300"], ["4", "0.200"]]
    for said in ("toy2d --run.seed 7`: 1050 steps, then 2048 samples, in 61 s", "fresh points the distance is 0.159."):
        assert said in page.read_text()


def test_steps_have_a_line_for_each_setting_and_a_column_where_settings_differ(tmp_path: Path) -> None:
    step = "imagenet256-w2,{},none,ddp,{},64,1,False,441.48,430,450,145.4,75.48,75.6,12,41,0.4,678,256,1,2,2.11,GPU,{}"
    rows = [step.format("on", 1, 1234567), step.format("off", 1, 1234567), step.format("on", 2, 7654321)]
    page, data = place_table(tmp_path, [",".join(STEP_COLUMNS), *rows, rows[0].replace("ddp", "fsdp")])
    build.build([page], data)
    found = cells(page.read_text())
    assert found[0] == ["GPUs", "compile", "checkpointing", "parallel", "ms a step", "images/s", "peak GiB"]
    assert found[1] == ["1", "on", "none", "ddp", "441", "145", "75.5"]
    assert [line[:4] for line in found[2:]] == [
        ["1", "off", "none", "ddp"], ["2", "on", "none", "ddp"], ["1", "on", "none", "fsdp"]
    ]  # fmt: skip
    assert "code: 1234567 and 7654321. In every row: preset imagenet256-w2, batch 64" in page.read_text()
    page.write_text("<!-- table: machine/rows parallel=ddp gpus=1 -->\n<!-- end -->\n")
    build.build([page], data)
    assert [line[:4] for line in cells(page.read_text())[1:]] == [["1", c, "none", "441"] for c in ("on", "off")]
    page.write_text("<!-- table: machine/rows queries=1 -->\n<!-- end -->\n")
    with pytest.raises(BuildError, match=r"no column 'queries'; there are preset, compile"):
        build.build([page], data)
