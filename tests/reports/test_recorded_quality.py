"""The recorded figures of training keep what is promised of the presets that gave them."""

import pandas as pd
import pytest
import torch

from reports.build import DATA
from reports.training_tables import FIGURES
from tvm_ref.training.presets import PRESETS
from verify.budget.network_tolerance import training_budget

NFE = [1, 2, 4]
LEAST_ACCURACY = 0.97  # of the samples are classified as their label
MOST_FRECHET = [0.30, 0.27, 0.25]  # distance of pixels between 0 and 1, for NFE
MOST_SECONDS = {"digits": 240, "toy2d": 120}  # from the command to its end, on two cores
MOST_W2 = 2.0  # of points of one evaluation, over that of as many fresh points


def recorded(preset: str) -> pd.DataFrame:
    """The figures of a preset, of which there is one file."""
    (file,) = DATA.glob(f"*/{preset}.csv")
    return pd.read_csv(file)


@pytest.mark.parametrize("preset", ["digits", "toy2d"])
def test_figures_are_of_one_run_of_the_preset_as_it_is(preset: str) -> None:
    figures, run = recorded(preset), PRESETS[preset]().run
    assert list(figures["nfe"]) == NFE
    same = figures.drop(columns=[name for name in ("nfe", *FIGURES) if name in figures])
    assert len(same.drop_duplicates()) == 1
    first = figures.iloc[0]
    measured = (first["preset"], first["steps"], first["seed"])
    assert measured == (preset, run.steps, run.seed), "measure the preset anew: python -m bench.train_quality"


@pytest.mark.parametrize("preset", MOST_SECONDS)
def test_a_run_ends_within_the_time_that_is_promised(preset: str) -> None:
    first = recorded(preset).iloc[0]
    assert 0 < first["seconds"] <= MOST_SECONDS[preset]
    assert 0 < first["processor_seconds"] <= 2 * first["seconds"]  # two cores
    assert "(2 CPUs)" in first["machine"]


def test_recorded_steps_of_one_global_batch_agree_however_they_were_made() -> None:
    """Blocks compiled, recomputed or neither, on one GPU or several: in bfloat16, added in another order."""
    (file,) = DATA.glob("*/xl2-step.csv")
    rows = pd.read_csv(file).dropna(subset=["loss", "gradient_norm"])
    for _, same in rows.groupby(["preset", "batch", "detach"]):
        for name in ("loss", "gradient_norm"):
            first = same[name].iloc[0]
            assert (same[name] - first).abs().max() <= training_budget(torch.bfloat16) * first


def test_digits_are_of_the_quality_that_is_promised() -> None:
    figures = recorded("digits")
    assert (figures["accuracy"] >= LEAST_ACCURACY).all()
    assert (figures["frechet"] <= MOST_FRECHET).all()


def test_points_of_one_evaluation_are_near_fresh_ones() -> None:
    first = recorded("toy2d").set_index("nfe").loc[1]
    assert first["w2"] <= MOST_W2 * first["w2_fresh"]
