"""The benchmark of packed sequences, windows and block masks runs, and counts scores right."""

import csv
from pathlib import Path

import pytest
import torch

from bench import partial

CPU = torch.device("cpu")


@pytest.mark.slow
def test_quick_preset(tmp_path: Path) -> None:
    assert partial.main(["--preset", "quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    with (tmp_path / "partial.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["mode"]) for row in rows] == [
        (subject.what, mode) for _, subject in partial.subjects("quick", CPU) for mode in partial.MODES
    ]
    assert all(float(row["ms"]) > 0 for row in rows)


def test_shares_by_hand() -> None:
    assert partial.varlen((3, 1), 2, CPU).share == 10 / 8
    assert partial.window(4, (1, 0)).share == 7 / 16
    assert partial.neighbours(4, 2, CPU).share == 4 / 16


def test_one_call_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        partial.main(["--preset", "none"])
    assert "--preset" in capsys.readouterr().err
