"""A build fills the marks of a page and draws the figures beside the data; a check finds what no longer fits."""

import re
from pathlib import Path

import pytest

from reports import build
from reports.build import BuildError
from reports.schema import COLUMNS, VersionError, write_rows
from reports.verification import write_verdicts
from reports.verify_plot import SWEEPS
from tests.reports.pages import cells, place, rows_of
from tests.reports.test_schema import make_row
from tests.reports.test_verification import make_verdict

pytestmark = pytest.mark.filterwarnings("error")  # such as of a layout that does not fit


@pytest.mark.parametrize("page", build.PAGES, ids=lambda page: page.stem)
def test_the_pages_of_this_repository_hold_the_tables_of_their_data(page: Path) -> None:
    assert build.BLOCK.search(page.read_text())
    assert build.render(page, build.DATA) == page.read_text(), "run python -m reports.build"


def test_figures_of_the_tables_in_the_pages_are_those_of_their_data() -> None:
    stale = build.check(build.PAGES, build.DATA, shown_only=True)
    assert not stale, "run python -m reports.build"


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
    readme, data = place(tmp_path, rows_of())
    build.build([readme], data)
    readme.write_text(readme.read_text().replace("7.00 ms", "9.00 ms"))
    (data / "machine" / "sweep-speedup.png").unlink()
    assert build.check([readme], data) == [
        "README.md: table machine/sweep is not that of its data",
        "machine/sweep-speedup.png is missing",
    ]
    write_rows(data / "machine" / "sweep.csv", rows_of(commit="fedcba9"))
    others = ("", "-latency", "-memory", "-throughput")
    assert build.check([readme], data) == [
        "README.md: table machine/sweep is not that of its data",
        *(f"machine/sweep{x}.png was not made by a build from sweep.csv as it is" for x in others),
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
