import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reports.verification import COLUMNS, Verdict, read_verdicts, worst, write_verdicts


def make_verdict(**changes: Any) -> Verdict:
    """A row with every column filled."""
    values: dict[str, Any] = {
        "run": "2025-01-01T00:00:00Z",
        "check": "float64",
        "group": "lengths",
        "case": "lengths_33_257",
        "backend": "tiled",
        "dtype": "float32",
        "quantity": "d_q",
        "queries": 33,
        "keys": 257,
        "head_dim": 16,
        "value_dim": 16,
        "magnitude": 1.0,
        "error": 1e-7,
        "budget": 0.3,
        "worst_row": 2e-7,
        "worst_row_budget": 5e-7,
        "dense_error": 1e-7,
        "ratio_to_dense": 1.0,
        "ok": True,
        "reason": "",
        "seed": 3,
        "reproduce": "python -m verify --case lengths_33_257",
        "device": "cpu",
        "machine": "Test, two CPUs",
        "driver": "none",
        "torch_version": "2.13.0",
        "triton_version": "3.9.0",
        "commit": "0123abc",
    }
    return Verdict(**(values | changes))


@pytest.mark.parametrize("name", ["verify.csv", "verify.csv.gz"])
def test_a_file_holds_every_column_of_every_row(name: str, tmp_path: Path) -> None:
    rows = [make_verdict(), make_verdict(error=None, budget=None, ok=False, reason='RuntimeError: "a",\nb')]
    path = tmp_path / "new" / name
    write_verdicts(path, [make_verdict()])
    write_verdicts(path, rows)
    assert list(path.parent.iterdir()) == [path]
    data = pd.read_csv(path, keep_default_na=False)
    assert tuple(data.columns) == COLUMNS
    assert len(data) == 2
    first = {name: str(value) for name, value in asdict(rows[0]).items()}
    assert {name: str(data[name][0]) for name in COLUMNS} == first
    assert (data["error"][1], data["reason"][1]) == ("", 'RuntimeError: "a", b')


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [make_verdict(), make_verdict(error=None, worst_row=math.inf, ok=False, reason="NaN", seed=7)]
    write_verdicts(tmp_path / "verify.csv.gz", rows)
    assert read_verdicts(tmp_path / "verify.csv.gz") == rows


def test_errors_have_six_digits_and_sizes_all(tmp_path: Path) -> None:
    write_verdicts(tmp_path / "verify.csv", [make_verdict(error=1.23456789e-7, budget=0.1 + 0.2, magnitude=1.23456789)])
    (row,) = read_verdicts(tmp_path / "verify.csv")
    assert (row.error, row.budget, row.magnitude) == (1.23457e-7, 0.3, 1.23456789)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"error": 2e-7, "budget": 4e-7, "worst_row": 3e-7, "worst_row_budget": 4e-7}, 0.75),
        ({"error": 0.0, "budget": 0.0, "worst_row": None}, 0.0),
        ({"error": 1e-9, "budget": 0.0, "worst_row": None}, math.inf),
        ({"error": None, "budget": 1e-7, "worst_row": None}, None),
    ],
)
def test_the_share_is_the_larger_error_over_its_budget(changes: dict[str, Any], share: float | None) -> None:
    assert make_verdict(**changes).share == share


def test_nan_is_the_worst() -> None:
    assert worst([]) is worst([None]) is None
    assert worst([1.0, None, 2.0]) == 2.0
    assert math.isnan(worst([1.0, math.nan, 2.0]) or 0.0)
    assert math.isnan(make_verdict(error=math.nan).share or 0.0)
