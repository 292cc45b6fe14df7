"""Rows of a sweep, and pages with a mark for a table, that the tests of reports build."""

from pathlib import Path
from typing import Any

from reports.schema import Row, write_rows
from tests.reports.test_schema import make_row

README = "# Title\n\n<!-- table: machine/sweep{} -->\n<!-- end -->\n\nText.\n"


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


def place_table(tmp_path: Path, lines: list[str]) -> tuple[Path, Path]:
    """A page in a folder of its own with one mark, and the folder of its data."""
    page, csv = tmp_path / "docs" / "page.md", tmp_path / "reports" / "data" / "machine" / "rows.csv"
    for path in (page, csv):
        path.parent.mkdir(parents=True)
    page.write_text("<!-- table: machine/rows -->\n<!-- end -->\n")
    csv.write_text("\n".join(lines) + "\n")
    return page, csv.parent.parent
