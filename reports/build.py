"""`python -m reports.build`: the tables of README.md and docs/, and the figures, from reports/data/*/*.csv and .csv.gz.

A page says where a table goes, of which file it is, and which rows it shows:

    <!-- table: nvidia-h200/paper heads=24 queries=1024,8192 -->
    <!-- end -->

The name is the CSV's in reports/data, without its ending; a word after it keeps the rows whose column has one of the
values (mode=fwd keeps plain-fwd, too). What stands between the two marks is replaced. Figures are written beside each
sweep, and beside each verification that a page shows. With --check nothing is written: the exit status is 1 if a table
or a figure is not that of its data.
"""

import gzip
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from flashjvp_commands import arguments as types
from flashjvp_commands import ending

from . import verify_plot
from .coverage import draw_coverage, is_coverage, worst_table
from .environment import DATA, IS_CHECKOUT, ROOT
from .host_times import HOST_COLUMNS, host_table
from .interleaved import INTERLEAVED_COLUMNS, interleaved_table
from .panels import LATENCY, MEMORY, THROUGHPUT
from .plot import draw_lines, draw_speedup, draw_sweep, has_speedup, save
from .precision import PRECISION_COLUMNS, draw_precision, precision_table
from .schema import Row, SchemaError, read_rows
from .step_profile import OLD_PROFILE_COLUMNS, PROFILE_COLUMNS, profile_table
from .style import OURS, STYLE, whole_mode
from .tables import sweep_table, verification_table
from .training_tables import (
    DIGITS_COLUMNS,
    OLD_DIGITS_COLUMNS,
    OLD_STEP_COLUMNS,
    OLD_TOY_COLUMNS,
    STEP_COLUMNS,
    STEP_COLUMNS_2,
    STEP_COLUMNS_3,
    TOY_COLUMNS,
    digits_table,
    step_table,
    toy_table,
)
from .verification import COLUMNS as VERIFICATION_COLUMNS
from .verification import read_verdicts

DOCS = ROOT / "docs"
NAMES = ("benchmarks.md", "numerics.md", "training.md", "performance.md", "performance-log.md")
PAGES = (ROOT / "README.md", *(DOCS / name for name in NAMES))
BLOCK = re.compile(r"^<!-- table: (\S+)((?: \S+=\S+)*) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)


# The columns of a file that is no sweep, and its table.
TABLES: dict[tuple[str, ...], Callable[[pd.DataFrame], str]] = {
    VERIFICATION_COLUMNS: verification_table,
    DIGITS_COLUMNS: digits_table,
    OLD_DIGITS_COLUMNS: digits_table,
    TOY_COLUMNS: toy_table,
    OLD_TOY_COLUMNS: toy_table,
    STEP_COLUMNS: step_table,
    STEP_COLUMNS_2: step_table,
    STEP_COLUMNS_3: step_table,
    OLD_STEP_COLUMNS: step_table,
    PROFILE_COLUMNS: profile_table,
    OLD_PROFILE_COLUMNS: profile_table,
    INTERLEAVED_COLUMNS: interleaved_table,
    HOST_COLUMNS: host_table,
    PRECISION_COLUMNS: precision_table,
}


OTHERS_WITH_FIGURES = (VERIFICATION_COLUMNS, PRECISION_COLUMNS)


class BuildError(ValueError):
    """A mark in a page, or a file of rows, that no table can be made of; says which and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every table and figure is that of its data (after writing, unless --check), 1 if not, 2 for a bad input."""
    parser = types.parser(
        "python -m reports.build", "Tables of README.md and docs, and figures, from reports/data of a checkout."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something is stale")
    options = parser.parse_args(arguments)
    if not IS_CHECKOUT:
        parser.error("expected a checkout of the project, which has docs/; this is an installed package")
    try:
        problems = check(PAGES, DATA) if options.check else build(PAGES, DATA)
    except (BuildError, SchemaError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(problems) if problems else "tables and figures are those of the data")
    return 1 if problems and options.check else 0


def build(pages: Sequence[Path], data: Path) -> list[str]:
    """Writes the tables of the pages and every figure; returns what it wrote, in words."""
    written = []
    for page in pages:
        new = render(page, data)
        if new != page.read_text():
            temporary = page.with_name(page.name + ".tmp")
            temporary.write_text(new)
            temporary.replace(page)
            written.append(f"{page.name}: {len(BLOCK.findall(new))} tables")
    for csv in (*sweeps(data), *others_with_figures(pages, data)):
        with plt.rc_context(STYLE):
            for path, draw in figures(csv).items():
                save(draw(), path, source(csv))
                written.append(str(path.relative_to(data)))
    return written


def check(pages: Sequence[Path], data: Path, shown_only: bool = False) -> list[str]:
    """What a build would change, in words; with `shown_only`, of the figures those of files that a page shows."""
    marks = [(page, found) for page in pages for found in BLOCK.finditer(_whole(page))]
    stale = [
        f"{page.name}: table {found[1]}{found[2]} is not that of its data"
        for page, found in marks
        if found[0] != block(found, page, data)
    ]
    shown = {data / f"{found[1]}.csv" for _, found in marks}
    drawn = [csv for csv in sweeps(data) if csv in shown or not shown_only]
    for csv in (*drawn, *others_with_figures(pages, data)):
        for path in figures(csv):
            if not path.exists():
                stale.append(f"{path.relative_to(data)} is missing")
            elif _source_in(path) != source(csv):
                stale.append(f"{path.relative_to(data)} was not made by a build from {csv.name} as it is")
    return stale


def render(page: Path, data: Path) -> str:
    """The text of a page with every table made anew. Raises BuildError for a mark that is torn or names nothing."""
    return BLOCK.sub(lambda found: block(found, page, data), _whole(page))


def block(found: re.Match[str], page: Path, data: Path) -> str:
    """A mark of a page, its table, and the mark of its end."""
    name, words = found[1], found[2].split()
    csv = _file(name, data)
    rows_link = f"[{csv.name}]({_link(csv, page)})"
    if make := TABLES.get(tuple(_header(csv))):
        table = make(_filtered(pd.read_csv(csv, dtype={"commit": str}), words, name))
        table += f" Rows: {rows_link}."
    else:
        rows = rows_of_one_run(csv)
        frame = pd.DataFrame([{**vars(row), "mode": whole_mode(row.mode)} for row in rows])
        reasons = "reasons=no" not in words
        chosen = _filtered(frame, [word for word in words if word != "reasons=no"], name)
        if is_coverage(rows):  # plain attention has to stay among the rows
            table = worst_table(rows)
        else:
            table = sweep_table([rows[i] for i in chosen.index], rows, reasons=reasons)
        links = _figure_links(csv, page)
        table += f" Rows: {rows_link}" + (f", figures: {links}." if links else ".")
    return f"<!-- table: {name}{found[2]} -->\n\n{table}\n\n<!-- end -->"


def sweeps(data: Path) -> list[Path]:
    """The files of sweeps, of whatever version, in order. Others, such as verifications, have other columns."""
    return [csv for csv in sorted(data.glob("*/*.csv")) if {"provider", "mode", "status"} <= set(_header(csv))]


def others_with_figures(pages: Sequence[Path], data: Path) -> list[Path]:
    """The files of verifications, and of errors against scores, that a page has a table of."""
    names = dict.fromkeys(found[1] for page in pages for found in BLOCK.finditer(_whole(page)))
    return [csv for csv in (_file(name, data) for name in names) if tuple(_header(csv)) in OTHERS_WITH_FIGURES]


def rows_of_one_run(csv: Path) -> list[Row]:
    """The rows of a file; ratios need them to be of one run, else BuildError."""
    rows = read_rows(csv)
    runs = sorted({row.run for row in rows})
    if len(runs) != 1:
        found = f"{len(runs)} runs ({', '.join(runs)})" if runs else "no row"
        raise BuildError(f"{csv}: {found}; tables and figures compare providers of one run: keep one run in a file")
    return rows


def figures(csv: Path) -> dict[Path, Callable[[], Figure]]:
    """The figures of a sweep or a verification: where each goes and how it is drawn."""
    if tuple(_header(csv)) == VERIFICATION_COLUMNS:
        return verify_plot.figures(read_verdicts(csv), csv.with_name(csv.name.split(".")[0]))
    if tuple(_header(csv)) == PRECISION_COLUMNS:
        return {csv.with_suffix(".png"): partial(draw_precision, pd.read_csv(csv))}
    rows = rows_of_one_run(csv)
    if is_coverage(rows):
        return {csv.with_suffix(".png"): partial(draw_coverage, rows)}
    found: dict[str, Callable[[], Figure]] = {}
    if len({row.queries for row in rows}) > 1:
        lines = {"-latency": LATENCY, "-memory": MEMORY, "-throughput": THROUGHPUT}
        found[""] = partial(draw_sweep, rows)
        found |= {name: partial(draw_lines, rows, what) for name, what in lines.items()}
    elif {row.provider for row in rows} != {OURS}:  # a table says as much of one provider at one length
        found[""] = partial(draw_sweep, rows)
    if has_speedup(rows):
        found["-speedup"] = partial(draw_speedup, rows)
    return {csv.with_name(f"{csv.stem}{name}.png"): draw for name, draw in found.items()}


def source(csv: Path) -> str:
    """What a figure says that it was made from."""
    return f"{csv.name} sha256 {hashlib.sha256(csv.read_bytes()).hexdigest()}"


def _whole(page: Path) -> str:
    """The text of a page, none of whose marks is torn."""
    text = page.read_text()
    if text.count("<!-- table:") != len(BLOCK.findall(text)):
        raise BuildError(
            f"{page.name}: a mark `<!-- table: NAME column=value -->` is malformed, or has no `<!-- end -->` after it"
        )
    return text


def _filtered(data: pd.DataFrame, words: Sequence[str], name: str) -> pd.DataFrame:
    for word in words:
        column, _, values = word.partition("=")
        if column not in data:
            raise BuildError(f"the table {name}: no column {column!r}; there are {', '.join(data)}")
        kept = data[data[column].astype(str).str.lower().isin(values.lower().split(","))]
        if kept.empty:
            raise BuildError(f"the table {name}: no row with {word}; there are {sorted(set(data[column]))}")
        data = kept
    return data


def _header(csv: Path) -> list[str]:
    with gzip.open(csv, "rt") if csv.suffix == ".gz" else csv.open(errors="replace") as file:
        return file.readline().strip().split(",")


def _link(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _file(name: str, data: Path) -> Path:
    """The file of rows that a mark names; where there are many rows it is compressed."""
    for csv in (data / f"{name}.csv", data / f"{name}.csv.gz"):
        if csv.is_file():
            return csv
    raise BuildError(f"the table {name}: there is no file {data / name}.csv or {csv.name}")


def _figure_links(csv: Path, page: Path) -> str:
    names = [(path.stem.removeprefix(csv.stem).removeprefix("-") or "overview", path) for path in figures(csv)]
    return ", ".join(f"[{name}]({_link(path, page)})" for name, path in names)


def _source_in(figure: Path) -> str:
    with Image.open(figure) as image:
        return str(image.info.get("Source", ""))


if __name__ == "__main__":
    sys.exit(ending.run(main))
