"""Learning-rate schedules follow their closed forms, and a resumed run goes on with its own."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.tvm_ref.runs import toy
from tvm_ref.training.batches import mirrored
from tvm_ref.training.config import ConfigError, OptimConfig, TrainConfig
from tvm_ref.training.parallel import world
from tvm_ref.training.schedule import learning_rate
from tvm_ref.training.trainer import Trainer

STEPS = 20
FORMS = {
    "constant": lambda n: np.ones_like(n),
    "cosine": lambda n: np.cos(np.pi * (n - 1) / STEPS / 2) ** 2,
    "inverse-sqrt": lambda n: np.minimum(1, (8 / n) ** 0.5),
}


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", FORMS)
def test_rates_follow_the_closed_form(name: str, warmup: int) -> None:
    optim = OptimConfig(lr=0.3, schedule=name, warmup_steps=warmup, decay_steps=8)  # type: ignore[arg-type]
    n = np.arange(1.0, STEPS + 1)
    expected = 0.3 * FORMS[name](n) * np.minimum(1, n / max(warmup, 1))
    assert [learning_rate(optim, step, STEPS) for step in range(STEPS)] == pytest.approx(expected)
    assert not math.isnan(learning_rate(optim, STEPS + 5, STEPS))


def rates(config: TrainConfig) -> list[str]:
    with world("cpu") as this:
        assert Trainer(config, this, Console(quiet=True)).run()
    rows = (Path(config.run.out) / "metrics.csv").read_text().splitlines()
    return [row.split(",")[-1] for row in rows[1:]]


@pytest.mark.parametrize("name", ["cosine", "inverse-sqrt"])
def test_a_resumed_run_goes_on_with_its_schedule(name: str, tmp_path: Path) -> None:
    def config(folder: str, **run: object) -> TrainConfig:
        made = toy(tmp_path / folder, **run)
        return dataclasses.replace(made, optim=dataclasses.replace(made.optim, schedule=name, decay_steps=2))

    whole = rates(config("whole", steps=4))
    assert len(set(whole)) > 2
    resumed = config("whole", steps=4, resume=str(tmp_path / "whole" / "checkpoints" / "step-00000002"))
    assert rates(resumed) == whole
    longer = config("whole", steps=6)
    if name == "cosine":
        with pytest.raises(ConfigError, match=r"run\.steps: 4 before, 6 now"):
            rates(longer)
    else:
        assert rates(longer)[:4] == whole


def test_flips_depend_on_seed_step_and_position_only() -> None:
    x0 = torch.arange(64 * 2 * 2 * 3.0).reshape(64, 2, 2, 3)
    whole = mirrored(x0, 1, 5, range(64))
    assert torch.equal(torch.cat([mirrored(x0[i : i + 8], 1, 5, range(i, i + 8)) for i in range(0, 64, 8)]), whole)
    turned = (whole != x0).flatten(1).any(1)
    assert 10 < turned.sum() < 54 and torch.equal(whole[turned], x0[turned].flip(-1))
    assert not torch.equal(mirrored(x0, 1, 6, range(64)), whole) and not torch.equal(
        mirrored(x0, 2, 5, range(64)), whole
    )
