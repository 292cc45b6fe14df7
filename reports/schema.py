"""The row of a benchmark, and the CSV files that hold rows.

One `Row` is one provider in one mode on one shape. A file is a header with the field names in order and one line a row;
an empty cell is None. Rows are appended whole, one write each, so that an interrupted sweep loses nothing it measured.
"""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas as pd

SCHEMA_VERSION = 1
MODES = ("fwd", "bwd", "fwd+bwd")
MASKS = ("none", "bool", "additive")
STATUSES = ("ok", "wrong", "oom", "crashed", "timeout", "unsupported", "error")


class SchemaError(ValueError):
    """A CSV of rows that cannot be read; names the file, the line and what is wrong there."""

    def __init__(self, path: Path, line: int, problem: str):
        super().__init__(f"{path}, line {line}: {problem}")
        self.path, self.line, self.problem = path, line, problem


class VersionError(SchemaError):
    """The file was written with another version of the schema."""


class DamagedError(SchemaError):
    """A line is torn, has the wrong number of cells, or a cell does not parse."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. Units are in the names; None is what was not measured, which `status` and `reason` explain.

    Latencies are percentiles over `repeats` calls. `tflops` counts 12 BHMND for a forward with JVP, 30 for the
    backward of both outputs, 42 for both, and half of that when causal with as many queries as keys. `inputs_mib` are
    q, k, v, their tangents and, with a backward, the cotangents; `peak_mib` is the peak of the call alone above them;
    `least_mib` is what any implementation must hold: inputs, outputs, gradients and row statistics; and `peak_ratio`
    = (inputs_mib + peak_mib) / least_mib. Errors are relative Frobenius norms against dense float64 attention on a
    reduced shape; `err_grad` is the worst gradient. `run` is the start of the sweep (UTC): ratios between providers
    are taken within one run only. `ceiling_tflops` is a large matrix product of the row's dtype in the same run.
    """

    schema_version: int = SCHEMA_VERSION
    run: str
    provider: str
    mode: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    causal: bool
    mask: str
    status: str
    reason: str = ""
    latency_p20_ms: float | None = None
    latency_p50_ms: float | None = None
    latency_p80_ms: float | None = None
    repeats: int | None = None
    tflops: float | None = None
    inputs_mib: float
    peak_mib: float | None = None
    least_mib: float
    peak_ratio: float | None = None
    err_o: float | None = None
    err_o_t: float | None = None
    err_grad: float | None = None
    device: str
    machine: str
    driver: str
    threads: int
    torch_version: str
    triton_version: str
    commit: str
    ceiling_tflops: float
    date_utc: str

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("mask", MASKS), ("status", STATUSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.status == "ok" and (self.latency_p50_ms is None or self.peak_mib is None):
            raise ValueError("a row with status ok needs latency_p50_ms and peak_mib")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a row with status {self.status} needs a reason")


COLUMNS = tuple(field.name for field in fields(Row))
_TYPES: dict[str, Any] = get_type_hints(Row)


def append_row(path: Path, row: Row) -> None:
    """Appends one row and flushes it to the disk; a new file gets its header first. A damaged or older file raises."""
    line = _line([_cell(value) for value in asdict(row).values()])
    if path.exists():
        _check_header(path)
        _append(path, line)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, _line(COLUMNS) + line)


def write_rows(path: Path, rows: Iterable[object], columns: Sequence[str] = COLUMNS) -> None:
    """Writes a whole file under a temporary name and renames it into place; the fields of a row are `columns`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(
        b"".join([_line(columns), *(_line([_cell(value) for value in vars(row).values()]) for row in rows)])
    )
    os.replace(temporary, path)


def read_rows(path: Path) -> list[Row]:
    """Every row of a file, in its order. Raises VersionError or DamagedError with the line; no line is skipped."""
    _check_header(path)
    lines = path.read_bytes().split(b"\n")
    return [_parse(path, number, line) for number, line in enumerate(lines[1:-1], start=2)]


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a data frame with one column a field."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS))


def _check_header(path: Path) -> None:
    """The header is this version's, and the file ends with a whole line."""
    text = path.read_bytes()
    header, _, body = text.partition(b"\n")
    if header.rstrip(b"\r") + b"\n" != _line(COLUMNS):
        version = body.split(b",", 1)[0].decode("utf-8", "replace")
        if header.startswith(b"schema_version,") and version.isdigit() and int(version) != SCHEMA_VERSION:
            raise VersionError(path, 1, f"schema version {version}, this program reads version {SCHEMA_VERSION}")
        raise DamagedError(path, 1, f"the header is not that of schema version {SCHEMA_VERSION}: {header[:80]!r}...")
    if not text.endswith(b"\n"):
        raise DamagedError(path, text.count(b"\n") + 1, "the last line is torn: it has no line end")


def _parse(path: Path, line: int, text: bytes) -> Row:
    """The row of one line; a cell never holds a line end, so that a damaged line damages no other."""
    try:
        cells = next(csv.reader([text.decode("utf-8")], strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DamagedError(path, line, str(error)) from error
    if cells and cells[0].isdigit() and int(cells[0]) != SCHEMA_VERSION:
        raise VersionError(path, line, f"schema version {cells[0]}, this program reads version {SCHEMA_VERSION}")
    if len(cells) != len(COLUMNS):
        raise DamagedError(path, line, f"{len(cells)} cells, expected {len(COLUMNS)}")
    values: dict[str, Any] = {}
    for name, cell in zip(COLUMNS, cells, strict=True):
        try:
            values[name] = _value(_TYPES[name], cell)
        except ValueError as error:
            raise DamagedError(path, line, f"column {name}: {error}") from error
    try:
        return Row(**values)
    except ValueError as error:
        raise DamagedError(path, line, str(error)) from error


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(value.split()) if isinstance(value, str) else repr(value)


def _value(kind: Any, cell: str) -> object:
    options = get_args(kind) or (kind,)
    if cell == "" and type(None) in options:
        return None
    if options[0] is bool:
        if cell not in ("true", "false"):
            raise ValueError(f"expected true or false, found {cell!r}")
        return cell == "true"
    return options[0](cell)


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
