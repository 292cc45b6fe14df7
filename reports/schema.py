"""The row of a benchmark, and the CSV files that hold rows.

One `Row` is one provider in one mode on one shape. A file is a header with the field names in order and one line a row;
an empty cell is None. Rows are appended whole, one write each, so that an interrupted sweep loses nothing it measured.
"""

import csv
import gzip
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas as pd

SCHEMA_VERSION = 3
MODES = ("fwd", "bwd", "fwd+bwd", "plain-fwd", "plain-bwd", "plain-fwd+bwd", "approx-fwd")
MASKS = ("none", "bool", "additive", "empty-rows")
COTANGENTS = ("both", "o", "o_t")
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

    Only rows with status `ok` count. `wrong` is beyond verify's error budget, and may have a latency all the same;
    `oom`, `crashed`, `timeout` and `error` say how a call ended, `unsupported` that a provider has no such call.

    Modes: `fwd` is o and o_t; `bwd` the gradients of both, with both cotangents, in all six inputs, after a forward
    that is not timed; `fwd+bwd` both. What a provider has only in part has a name of its own: `plain-fwd`, `plain-bwd`,
    `plain-fwd+bwd` are attention without a JVP (three inputs, one cotangent), `approx-fwd` is o and a difference
    quotient in place of o_t. Masks: `bool` and `additive` [queries, keys] forbid 30 % of the pairs, at random;
    `empty-rows` is boolean and leaves every third query without a key. `preset` names the list of shapes that the row
    belongs to, empty for none. `value_dim` is the head dim of v where that is another than that of q and k. `tangents`
    are those of q, k and v that have one, and `cotangents` the outputs that have one. `run` is the start of the sweep
    (UTC): ratios are taken within one run only.

    Latencies are percentiles over `repeats` calls; `host_us` is the wall time that the host takes for a call on a tiny
    shape. `tflops` counts 12 BHMND for fwd, 30 for bwd, 42 for fwd+bwd (4, 10, 14 plain; 8 approx-fwd), and half of
    that when causal with as many queries as keys. `inputs_mib` are the inputs, their tangents, the mask and, with a
    backward, the cotangents; `peak_mib` is the peak of the call alone above them (for bwd with what the forward left);
    `least_mib` is what any implementation must hold: inputs, outputs, gradients and row statistics; and `peak_ratio`
    = (inputs_mib + peak_mib) / least_mib. Errors are relative Frobenius norms against dense float64 attention on a
    reduced shape; `err_grad` is the worst gradient. `ceiling_tflops` is a large matrix product of the row's dtype and
    `ceiling_gbs` a large copy (bytes read and written, 1e9 a second), both in the same run.
    """

    schema_version: int = SCHEMA_VERSION
    run: str
    preset: str = ""
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
    value_dim: int | None = None
    tangents: str = "qkv"
    cotangents: str = "both"
    status: str
    reason: str = ""
    latency_p20_ms: float | None = None
    latency_p50_ms: float | None = None
    latency_p80_ms: float | None = None
    repeats: int | None = None
    host_us: float | None = None
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
    ceiling_gbs: float
    date_utc: str

    def __post_init__(self) -> None:
        of = ("mode", MODES), ("mask", MASKS), ("cotangents", COTANGENTS), ("status", STATUSES)
        for name, allowed in of:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.status == "ok" and (self.latency_p50_ms is None or self.peak_mib is None):
            raise ValueError("a row with status ok needs latency_p50_ms and peak_mib")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a row with status {self.status} needs a reason")


COLUMNS = tuple(field.name for field in fields(Row))
# What version 2 had: its rows are of equal head dims, with every tangent and cotangent.
COLUMNS_2 = tuple(name for name in COLUMNS if name not in ("value_dim", "tangents", "cotangents"))
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
    """Writes a whole file under a temporary name and renames it into place; the fields of a row are `columns`. A file
    named .gz is compressed, the same rows to the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = b"".join([_line(columns), *(_line([_cell(value) for value in vars(row).values()]) for row in rows)])
    temporary.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    os.replace(temporary, path)


def read_rows(path: Path) -> list[Row]:
    """Every row of a file, in its order. Raises VersionError or DamagedError with the line; no line is skipped.

    A file of version 2 is read, too, but not appended to.
    """
    columns = _check_header(path, (COLUMNS, COLUMNS_2))
    lines = path.read_bytes().split(b"\n")
    return [_parse(path, number, line, columns) for number, line in enumerate(lines[1:-1], start=2)]


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a data frame with one column a field."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS))


def _check_header(path: Path, known: Sequence[Sequence[str]] = (COLUMNS,)) -> Sequence[str]:
    """The columns of the file, which are known ones; the file ends with a whole line."""
    text = path.read_bytes()
    header, _, body = text.partition(b"\n")
    columns = next((x for x in known if header.rstrip(b"\r") + b"\n" == _line(x)), None)
    if columns is None:
        version = body.split(b",", 1)[0].decode("utf-8", "replace")
        if header.startswith(b"schema_version,") and _is_other_version(version):
            raise VersionError(path, 1, _other_version(version))
        raise DamagedError(path, 1, f"the header is not that of schema version {SCHEMA_VERSION}: {header[:80]!r}...")
    if not text.endswith(b"\n"):
        raise DamagedError(path, text.count(b"\n") + 1, "the last line is torn: it has no line end")
    return columns


def _is_other_version(cell: str, version: int = SCHEMA_VERSION) -> bool:
    return cell.isdecimal() and int(cell) != version


def _other_version(cell: str) -> str:
    age = "an older" if int(cell) < SCHEMA_VERSION else "a newer"
    return f"schema version {cell}, {age} one: this program reads version {SCHEMA_VERSION} (measure again)"


def _parse(path: Path, line: int, text: bytes, columns: Sequence[str]) -> Row:
    """The row of one line; a cell never holds a line end, so that a damaged line damages no other."""
    try:
        cells = next(csv.reader([text.decode("utf-8")], strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DamagedError(path, line, str(error)) from error
    if cells and _is_other_version(cells[0], SCHEMA_VERSION if columns is COLUMNS else 2):
        raise VersionError(path, line, _other_version(cells[0]))
    if len(cells) != len(columns):
        raise DamagedError(path, line, f"{len(cells)} cells, expected {len(columns)}")
    values: dict[str, Any] = {}
    for name, cell in zip(columns, cells, strict=True):
        try:
            values[name] = _value(_TYPES[name], cell)
        except ValueError as error:
            raise DamagedError(path, line, f"column {name}: {error}") from error
    try:
        return Row(**values | {"schema_version": SCHEMA_VERSION})
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
