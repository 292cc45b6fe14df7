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
    for row in rows:
        assert ("documents" in row["what"] or "neighbourhood" in row["what"]) == (row["of_blocks"] != "")
    one = next(row for row in rows if row["what"] == "2 documents")
    found = float(one["dense_ms"]) * float(one["block_share"]) / float(one["ms"])
    assert float(one["block_share"]) == 0.5 and float(one["of_blocks"]) == pytest.approx(found)


def test_shares_by_hand() -> None:
    assert partial.varlen((3, 1), 2, CPU).share == 10 / 8
    assert partial.window(4, (1, 0)).share == 7 / 16
    assert partial.neighbours(4, 2, CPU).share == 4 / 16


def test_shares_of_blocks_by_hand() -> None:
    """Blocks of 128 x 128 that have a visible score."""
    assert partial.documents(512, 2, CPU).block_share == 8 / 16
    assert partial.documents(512, 8, CPU).block_share == 4 / 16  # two documents in a block on the diagonal
    assert partial.causal(512, CPU).block_share == 10 / 16
    assert partial.window(512, (1, 1)).block_share is None and partial.varlen((3, 1), 2, CPU).block_share is None


def test_one_call_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        partial.main(["--preset", "none"])
    assert "--preset" in capsys.readouterr().err
