"""Tables of training runs: the quality of digits and points, and the time of a step."""

import re
from pathlib import Path

import pytest

from reports import build
from reports.build import BuildError
from reports.training_tables import DIGITS_COLUMNS, OLD_DIGITS_COLUMNS, OLD_STEP_COLUMNS, STEP_COLUMNS_2, TOY_COLUMNS
from tests.reports.pages import cells, place_table

pytestmark = pytest.mark.filterwarnings("error")  # such as of a layout that does not fit


def test_the_quality_of_digits_has_a_line_for_each_number_of_evaluations(tmp_path: Path) -> None:
    run = "1797,{},{},0.9,0.505,0.61,0.99,0.016,1,0.931,0.999,0.01,0.02,0.03,131.4,124.5,a CPU,2.13,0123456"
    lines = [f"digits,576,7,{nfe},{run.format(*found)}" for nfe, found in ((1, (0.97449, 0.2996)), (4, (1.0, 0.2)))]
    page, data = place_table(tmp_path, [",".join(DIGITS_COLUMNS), *lines])
    build.build([page], data)
    assert cells(page.read_text())[1:] == [
        ["1", "97.4%", "0.300", "0.90", "0.51", "0.61"], ["4", "100.0%", "0.200", "0.90", "0.51", "0.61"],
        ["real digits, drawn with replacement", "", "0.016", "1.00", "0.93", "1.00"],
    ]  # fmt: skip
    for said in (
        "a CPU; torch 2.13, commit 0123456", "--run.seed 7`: 576 steps, then 1797 samples, in 131 s (124 s of",
        "Cycle error: 0.010 from t = 0.25, 0.020 from t = 0.5, 0.030 from t = 1;", "99.0% of the",
    ):  # fmt: skip
        assert said in page.read_text()
    (link,) = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert (page.parent / link).is_file()


def test_the_quality_of_points_stands_beside_that_of_fresh_ones(tmp_path: Path) -> None:
    lines = [
        f"toy2d,1050,7,{nfe},2048,{w2},0.7,0.8,1.25,0.15886,0.95,0.94,1.01,0.1,0.2,0.3,61,56,a CPU,2.13,0123456"
        for nfe, w2 in ((1, 0.30041), (4, 0.2))
    ]
    page, data = place_table(tmp_path, [",".join(TOY_COLUMNS), *lines])
    build.build([page], data)
    assert cells(page.read_text())[1:] == [
        ["1", "0.300", "0.70", "0.80", "1.25"], ["4", "0.200", "0.70", "0.80", "1.25"],
        ["other fresh points", "0.159", "0.95", "0.94", "1.01"],
    ]  # fmt: skip
    assert "toy2d --run.seed 7`: 1050 steps, then 2048 samples, in 61 s" in page.read_text()


def test_a_file_from_before_a_figure_was_measured_has_no_column_of_it(tmp_path: Path) -> None:
    line = "digits,576,7,1,1797,0.97449,0.2996,0.99,0.01,0.02,0.03,131.4,124.5,a CPU,2.13,0123456"
    page, data = place_table(tmp_path, [",".join(OLD_DIGITS_COLUMNS), line])
    build.build([page], data)
    assert cells(page.read_text())[1:] == [["1", "97.4%", "0.300"]]


def test_steps_have_a_line_for_each_setting_and_a_column_where_settings_differ(tmp_path: Path) -> None:
    step = (
        "imagenet256-w2,bfloat16,{},none,off,ddp,{},64,1,tvm,False,441.48,430,450,145.4,75.48,75.6,12,41,0.4,9,678,256,"
        "1,2,2.11,GPU,{}"
    )
    rows = [step.format("on", 1, 1234567), step.format("off", 1, 1234567), step.format("on", 2, 7654321)]
    page, data = place_table(tmp_path, [",".join(STEP_COLUMNS_2), *rows, rows[0].replace("ddp", "fsdp")])
    build.build([page], data)
    found = cells(page.read_text())
    heads = ["GPUs", "compile", "checkpointing", "parallel", "ms a step", "images/s", "peak GiB"]
    assert found[0] == [*heads, "first step, s"]
    assert found[1] == ["1", "on", "none", "ddp", "441", "145", "75.5", "41.0 (cold)"]
    assert found[2][-1] == "41.0"  # nothing was compiled
    assert [line[:4] for line in found[2:]] == [
        ["1", "off", "none", "ddp"], ["2", "on", "none", "ddp"], ["1", "on", "none", "fsdp"]
    ]  # fmt: skip
    same = "In every row: preset imagenet256-w2, precision bfloat16, CUDA graph off, batch 64"
    assert f"code: 1234567 and 7654321. {same}" in page.read_text()
    page.write_text("<!-- table: machine/rows parallel=ddp gpus=1 -->\n<!-- end -->\n")
    build.build([page], data)
    assert [line[:4] for line in cells(page.read_text())[1:]] == [["1", c, "none", "441"] for c in ("on", "off")]
    warm = rows[0].replace(",9,678", ",0,678").replace("tvm", "flow").replace(",256,", ",1024,")
    page, data = place_table(tmp_path / "more", [",".join(STEP_COLUMNS_2), rows[0], warm])
    build.build([page], data)
    more = cells(page.read_text())
    assert more[0][3:5] == ["objective", "tokens"] and more[2][3:5] == ["flow", "1024"]
    assert more[2][-1] == "41.0 (warm)"
    old = rows[0].replace("tvm,", "").replace(",9,678", ",678")
    page, data = place_table(tmp_path / "old", [",".join(OLD_STEP_COLUMNS), old])
    build.build([page], data)
    assert cells(page.read_text())[0] == [*heads[:3], *heads[4:]]
    page.write_text("<!-- table: machine/rows queries=1 -->\n<!-- end -->\n")
    with pytest.raises(BuildError, match=r"no column 'queries'; there are preset, precision, compile"):
        build.build([page], data)
