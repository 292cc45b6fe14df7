import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.schema import (
    COLUMNS,
    COLUMNS_2,
    DamagedError,
    Row,
    SchemaError,
    VersionError,
    append_row,
    frame,
    read_rows,
    write_rows,
)


def make_row(**changes: Any) -> Row:
    """A row with every column filled."""
    values: dict[str, Any] = {
        "run": "2025-01-01T00:00:00Z",
        "preset": "paper",
        "provider": "flashjvp",
        "mode": "fwd+bwd",
        "batch": 1,
        "heads": 4,
        "kv_heads": 2,
        "queries": 8192,
        "keys": 8192,
        "head_dim": 64,
        "dtype": "bfloat16",
        "causal": True,
        "mask": "none",
        "status": "ok",
        "reason": "",
        "latency_p20_ms": 1.25,
        "latency_p50_ms": 1.5,
        "latency_p80_ms": 0.1 + 0.2,
        "repeats": 30,
        "host_us": 21.5,
        "tflops": 300.0,
        "inputs_mib": 8.0,
        "peak_mib": 12.0,
        "least_mib": 16.5,
        "peak_ratio": 20 / 16.5,
        "err_o": 1e-3,
        "err_o_t": 2e-3,
        "err_grad": 3e-3,
        "device": "cuda",
        "machine": "NVIDIA H200",
        "driver": "580.1",
        "threads": 16,
        "torch_version": "2.13.0",
        "triton_version": "3.9.0",
        "commit": "0123abc-dirty",
        "ceiling_tflops": 700.0,
        "ceiling_gbs": 4200.0,
        "date_utc": "2025-01-01T00:01:00Z",
    }
    return Row(**(values | changes))


FAILED = {
    name: None
    for name in (
        *(
            "latency_p20_ms",
            "latency_p50_ms",
            "latency_p80_ms",
            "repeats",
            "host_us",
            "tflops",
            "peak_mib",
            "peak_ratio",
        ),
        *("err_o", "err_o_t", "err_grad"),
    )
}


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [
        make_row(),
        make_row(causal=False, latency_p50_ms=1 / 3, machine='quoted "name", with comma'),
        make_row(status="oom", reason="DefaultCPUAllocator: can't allocate, 17 GB", **FAILED),
        make_row(mode="bwd", preset=""),
    ]
    path = tmp_path / "folder" / "rows.csv"
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    write_rows(path, rows[:2])
    append_row(path, rows[2])
    assert read_rows(path) == rows[:3]
    assert not list(path.parent.glob("*.tmp"))


@given(
    values=st.fixed_dictionaries(
        {
            "latency_p50_ms": st.floats(min_value=1e-300, allow_infinity=False),
            "err_o_t": st.none() | st.floats(min_value=0),
            "repeats": st.none() | st.integers(min_value=0),
            "status": st.sampled_from(["error", "crashed"]),
            "reason": st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1),
            "causal": st.booleans(),
        }
    )
)
def test_any_value_comes_back(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    append_row(path, make_row(**values))
    assert read_rows(path) == [make_row(**values)]


def test_a_reason_of_many_lines_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_row(path, make_row(status="error", reason="first\n\n  second\r\nthird"))
    assert path.read_text().count("\n") == 2
    assert read_rows(path)[0].reason == "first second third"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "status must be one of"),
        ({"mode": "backward"}, "mode must be one of"),
        ({"mask": "causal"}, "mask must be one of"),
        ({"latency_p50_ms": None}, "needs latency_p50_ms"),
        ({"peak_mib": None}, "needs latency_p50_ms and peak_mib"),
        ({"status": "timeout"}, "needs a reason"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_row(**changes)


def cut_last_line(text: str) -> str:
    return text[:-20]


def set_cell(line: int, column: str, value: str) -> Any:
    def change(text: str) -> str:
        lines = text.split("\n")
        cells = lines[line - 1].split(",")
        cells[COLUMNS.index(column)] = value
        lines[line - 1] = ",".join(cells)
        return "\n".join(lines)

    return change


@pytest.mark.parametrize(
    ("change", "line", "kind", "problem"),
    [
        (cut_last_line, 4, DamagedError, "torn"),
        (lambda text: text.replace("8192,", "", 1), 2, DamagedError, "cells, expected"),
        (lambda text: text + "3,short\n", 5, DamagedError, "2 cells"),
        (lambda text: text + "\n", 5, DamagedError, "0 cells"),
        (lambda text: text.replace("latency_p50_ms", "latency", 1), 1, DamagedError, "header"),
        (lambda text: "", 1, DamagedError, "header"),
        (set_cell(3, "latency_p50_ms", "fast"), 3, DamagedError, "column latency_p50_ms"),
        (set_cell(4, "causal", "yes"), 4, DamagedError, "column causal"),
        (set_cell(4, "heads", ""), 4, DamagedError, "column heads"),
        (set_cell(2, "status", "splendid"), 2, DamagedError, "status must be one of"),
        (set_cell(3, "machine", '"open'), 3, DamagedError, "end of data"),
        (set_cell(3, "schema_version", "2"), 3, VersionError, "schema version 2, an older one"),
        (set_cell(3, "schema_version", "1"), 3, VersionError, "schema version 1, an older one"),
        (set_cell(3, "schema_version", "9"), 3, VersionError, "schema version 9, a newer one"),
        (lambda text: "schema_version,provider\n1,flashjvp\n", 1, VersionError, "schema version 1, an older one"),
    ],
)
def test_an_older_or_damaged_file_names_its_line(
    tmp_path: Path, change: Any, line: int, kind: type[SchemaError], problem: str
) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [make_row(), make_row(), make_row()])
    path.write_text(change(path.read_text()))
    with pytest.raises(kind, match=re.escape(problem)) as caught:
        read_rows(path)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{path}, line {line}: ")


def test_rows_of_version_2_are_read_and_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [make_row(), make_row(mode="bwd")]
    write_rows(path, rows, COLUMNS_2)
    lines = path.read_text().splitlines()
    cells = [dict(zip(COLUMNS, line.split(","), strict=True)) for line in _whole(path, rows)]
    older = [",".join(["2", *(cell[name] for name in COLUMNS_2[1:])]) for cell in cells]
    path.write_text("\n".join([lines[0], *older]) + "\n")
    assert read_rows(path) == rows
    with pytest.raises(VersionError, match="schema version 2, an older one"):
        append_row(path, rows[0])


def _whole(path: Path, rows: list[Row]) -> list[str]:
    """The lines of rows in a file of this version."""
    other = path.with_name("other.csv")
    write_rows(other, rows)
    return other.read_text().splitlines()[1:]


def test_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [make_row(machine="plain"), make_row()])
    path.write_bytes(path.read_bytes().replace(b"plain", b"\xff\xfe"))
    with pytest.raises(DamagedError, match=r"line 2: .* decode"):
        read_rows(path)


@pytest.mark.parametrize("change", [cut_last_line, lambda text: text.replace("provider", "supplier", 1)])
def test_nothing_is_appended_to_a_damaged_file(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [make_row()])
    path.write_text(change(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(DamagedError):
        append_row(path, make_row())
    assert path.read_bytes() == before


def test_the_frame_has_every_column_and_row() -> None:
    rows = [make_row(), make_row(status="timeout", reason="slow", **FAILED)]
    data = frame(rows)
    assert tuple(data.columns) == COLUMNS == tuple(field.name for field in dataclasses.fields(Row))
    assert list(data["status"]) == ["ok", "timeout"]
    assert list(frame([]).columns) == list(COLUMNS)
