"""`python -m bench.train_quality`: a CSV that the tables can be made of."""

from pathlib import Path

import pandas as pd
import pytest

from bench import train_quality
from reports.training_tables import DIGITS_COLUMNS, TOY_COLUMNS, digits_table, toy_table


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize(("preset", "columns"), [("digits", DIGITS_COLUMNS), ("toy2d", TOY_COLUMNS)])
def test_a_preset_is_trained_and_recorded(preset: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    settings = "--run.steps 2 --run.batch 8 --model.width 16 --model.depth 1 --run.seed 3"
    assert train_quality.main([preset, "--out", str(tmp_path), "--set", settings]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == f"{preset}.csv"
    rows = pd.read_csv(file, dtype={"commit": str})
    assert tuple(rows.columns) == columns
    assert rows["nfe"].tolist() == [1, 2, 4] and not rows.isna().any(axis=None)
    assert set(rows["steps"]) == {2} and set(rows["seed"]) == {3} and set(rows["preset"]) == {preset}
    assert (rows[["seconds", "processor_seconds"]] > 0).all(axis=None)
    table = (digits_table if preset == "digits" else toy_table)(rows)
    assert "--run.seed 3`: 2 steps" in table and "Cycle error" in table
