"""The benchmark of errors against the size of scores runs, and the table and the figure are made of its rows."""

import csv
from pathlib import Path

import pandas as pd
import pytest

from bench import precision
from reports.precision import PANELS, TENSORS, draw_precision, precision_table


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("precision") / "precision.csv"
    assert (
        precision.main(["--device", "cpu", "--heads", "1", "--tokens", "24", "--timed", "16", "--out", str(out)]) == 0
    )
    return out


def test_rows(rows: Path) -> None:
    with rows.open() as file:
        found = list(csv.DictReader(file))
    errors, times = ([row for row in found if (row["fwd_ms"] != "") is timed] for timed in (False, True))
    shapes = len(precision.DTYPES) * len(precision.HEAD_DIMS)
    assert len(errors) == shapes * len(precision.SCORES) * len(precision.PROVIDERS) and len(times) == shapes * 2
    assert all(float(row[name]) >= 0 for row in errors for name in TENSORS)
    assert all(float(row["fwd_ms"]) > 0 and float(row["bwd_ms"]) > 0 for row in times)
    nearer = [row["o_t"] for row in errors if row["dtype"] == "bfloat16" and row["scores"] == "30.0"]
    for _, default, high in zip(nearer[::3], nearer[1::3], nearer[2::3], strict=True):
        assert float(high) < float(default) / 4


def test_table_and_figure(rows: Path) -> None:
    data = pd.read_csv(rows)
    table = precision_table(data[data["dtype"] == "bfloat16"])
    assert "| bfloat16 | 64 | 1000 |" in table and "float16 |" not in table.replace("bfloat16 |", "")
    assert "1, 1, 16, 64 in bfloat16: forward and JVP" in table
    axes = draw_precision(data).axes
    assert len(axes) == len(PANELS) * len(precision.DTYPES) and all(
        len(x.lines) == len(precision.PROVIDERS) for x in axes
    )


def test_an_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        precision.main(["--device", "tpu"])
    assert "--device" in capsys.readouterr().err
