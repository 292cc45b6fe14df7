"""The row of a verification: one quantity of one check, its error and budget, and how to judge it again alone."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd

from .schema import write_rows

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One verdict. All errors and budgets are relative, without unit; None is what a check does not have.

    `check` is "float64" (the tensor `quantity` against float64 dense attention: `error` is the relative Frobenius
    norm, `worst_row` that of the worst row, `dense_error` what dense attention in the same type loses and
    `ratio_to_dense` the ratio of the two) or the name of an identity (`error` is the norm of the difference of its
    two sides over the norm of the larger). `ok` is that each error keeps its budget; else `reason` says what happened.
    `group` sorts cases by what they are about; `queries`, `keys`, `head_dim`, `value_dim` are sizes, `magnitude` the
    typical size of a score (in nats). `run` is the start of the verification (UTC); `reproduce` the command that
    judges this row alone.
    """

    schema_version: int = SCHEMA_VERSION
    run: str
    check: str
    group: str
    case: str
    backend: str
    dtype: str
    quantity: str
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    magnitude: float
    error: float | None = None
    budget: float | None = None
    worst_row: float | None = None
    worst_row_budget: float | None = None
    dense_error: float | None = None
    ratio_to_dense: float | None = None
    ok: bool
    reason: str = ""
    seed: int
    reproduce: str
    device: str
    machine: str
    driver: str
    torch_version: str
    triton_version: str
    commit: str

    @property
    def share(self) -> float | None:
        """The larger of the two errors over their budgets: up to 1 is within, None where nothing was measured."""
        pairs = ((self.error, self.budget), (self.worst_row, self.worst_row_budget))
        shares = [_share(error, budget) for error, budget in pairs if error is not None and budget is not None]
        return worst(shares)


COLUMNS = tuple(field.name for field in fields(Verdict))
_TYPES: dict[str, Any] = get_type_hints(Verdict)


def worst(values: Iterable[float | None]) -> float | None:
    """The largest number, NaN above all others; None when there is none."""
    return max((x for x in values if x is not None), key=lambda x: float("inf") if x != x else x, default=None)


def write_verdicts(path: Path, rows: Iterable[Verdict]) -> None:
    """Writes all rows as CSV, under a temporary name that is then renamed into place.

    Errors and budgets get six digits: with all seventeen a compressed file is twice as large.
    """
    write_rows(path, map(_rounded, rows), COLUMNS)


def read_verdicts(path: Path) -> list[Verdict]:
    """The rows of a CSV, compressed or not."""
    data = pd.read_csv(path, keep_default_na=False, dtype=str)
    return [Verdict(**{name: _parsed(kind, row[name]) for name, kind in _TYPES.items()}) for _, row in data.iterrows()]


def frame(rows: Sequence[Verdict]) -> pd.DataFrame:
    """The rows as a data frame with one column a field."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS))


def _rounded(row: Verdict) -> Verdict:
    errors = {name: getattr(row, name) for name, kind in _TYPES.items() if kind == float | None}
    rounded: dict[str, Any] = {name: float(f"{x:.6g}") for name, x in errors.items() if x is not None}
    return replace(row, **rounded)


def _parsed(kind: Any, text: str) -> Any:
    """A cell as its column's type; an empty one is None where there may be none."""
    if kind is bool:
        return text == "true"
    if kind == float | None:
        return float(text) if text else None
    return kind(text)


def _share(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return error / budget if budget > 0 else float("inf")
