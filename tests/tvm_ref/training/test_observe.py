"""Norms of blocks and the loss by time: right, equal for every number of processes, and without a trace in training."""

import csv
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tvm_ref.runs import change, digits, together, toy, train, train_silently
from tests.tvm_ref.training.test_reliability import state
from tvm_ref.data.dataset import open_dataset
from tvm_ref.objective.loss import LossConfig
from tvm_ref.training import step
from tvm_ref.training.batches import Batches
from tvm_ref.training.config import TrainConfig
from tvm_ref.training.observe import BinRow, NormRow, Observations
from tvm_ref.training.parallel import World
from tvm_ref.training.state import State
from tvm_ref.training.step import gradient

ALONE = World(0, 1, torch.device("cpu"))
WATCHED = {"log_norms": 2, "loss_bins": 4}


def rows(path: Path, kind: Any) -> list[Any]:
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert all(tuple(row) == kind._fields for row in found)
    return [kind(**{name: text if name == "part" else float(text) for name, text in row.items()}) for row in found]


def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"compile": True, "checkpointing": "selective", "accumulate": 2}, marks=pytest.mark.slow),
    ],
)
def test_observing_changes_no_bit_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    without_code_generation(monkeypatch)
    train(digits(tmp_path / "without", steps=3, **settings))
    train(digits(tmp_path / "with", steps=3, **settings, **WATCHED))
    assert (tmp_path / "with/metrics.csv").read_bytes() == (tmp_path / "without/metrics.csv").read_bytes()
    one, other = state(tmp_path / "with"), state(tmp_path / "without")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {row.step for row in rows(tmp_path / "with/norms.csv", NormRow)} == {2}


def observed(config: TrainConfig) -> tuple[State, Observations, list[torch.Tensor], list[torch.Tensor], list[Any]]:
    """The first step of a run: tokens and tangents of the first block, and (batch, results) of each call of the
    objective, seen by other means."""
    state, batches = State(config, ALONE), Batches(config, open_dataset(config.data), ALONE).draw(0)
    observations = Observations(config, state.network, ALONE)
    tokens, tangents, losses = [], [], []

    def note(_: Any, __: Any, output: Any) -> None:
        both = (output, None) if isinstance(output, torch.Tensor) else output
        tokens.append(both[0].detach())
        tangents.extend([] if both[1] is None else [both[1].detach()])

    state.network.blocks[0].register_forward_hook(note)
    state.objective.register_forward_hook(lambda _, arguments, results: losses.append((arguments[0], results)))
    observations.begin(1)
    gradient(state.objective, state.target, batches, ALONE, clip=1e-3, observer=observations)
    return state, observations, tokens, tangents, losses


def test_norms_are_those_of_the_gradients_before_clipping_and_of_the_outputs_of_blocks() -> None:
    config = digits(Path("run"), log_norms=1, accumulate=2)
    state, observations, tokens, tangents, _ = observed(config)
    assert len(tokens) == 4 and len(tangents) == 2  # per micro-batch: once with tangents, once for the flow term
    found = {row.part: row for row in observations.rows(1)[0]}
    assert set(found) == {
        "x_embedder", "t_embedder", "s_embedder", "guidance_embedder", "y_embedder", "blocks.0", "blocks.1",
        "final_layer",
    }  # fmt: skip
    for name, values in (("activation_rms", tokens), ("tangent_rms", tangents)):
        expected = torch.cat(values).double().square().mean().sqrt()
        torch.testing.assert_close(torch.tensor(getattr(found["blocks.0"], name)), expected.float())
    assert math.isnan(found["final_layer"].activation_rms)
    clipped = torch.cat([p.grad.flatten() for p in state.network.blocks[1].parameters() if p.grad is not None])
    whole = torch.tensor([row.gradient_norm for row in found.values()]).square().sum().sqrt()
    scale = whole / 1e-3  # what clipping divided by
    torch.testing.assert_close(torch.tensor(found["blocks.1"].gradient_norm), clipped.norm() * scale, **loose())


def loose() -> dict[str, float]:
    """Clipping divides by the norm plus 1e-6."""
    return {"rtol": 1e-3 + torch.finfo(torch.float32).eps, "atol": 0}


@pytest.mark.parametrize("objective", ["tvm", "meanflow"])
def test_the_loss_in_a_bin_is_the_mean_over_its_images(objective: Any) -> None:
    config = dataclasses.replace(digits(Path("run"), loss_bins=3), loss=LossConfig(w=1.5, objective=objective))
    _, observations, _, _, losses = observed(config)
    batch = losses[0][0]
    if objective == "tvm":
        (velocity, _), flow = (results for _, results in losses)  # a call for each term
    else:
        ((_, (_, velocity, flow)),) = losses
    _, bins = observations.rows(1)
    assert [(row.low, row.high) for row in bins] == [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]
    for row in bins:
        flow_time = batch.t if objective == "meanflow" else batch.s2
        for name, time, values in (("velocity", batch.t, velocity), ("flow", flow_time, flow)):
            inside = (time >= row.low) & ((time < row.high) | (row.high == 1))
            assert getattr(row, f"{name}_images") == inside.sum()
            expected = values.detach()[inside].mean()
            torch.testing.assert_close(torch.tensor(getattr(row, name)), expected.float(), equal_nan=True)
    assert sum(row.velocity_images for row in bins) == len(batch.t)
    observations.begin(2)
    assert all(row.velocity_images == 0 for row in observations.rows(2)[1])  # counted anew


def test_a_step_that_is_thrown_away_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss that is not finite, the run is resumed from a checkpoint without it."""
    whole, calls = step.flow_term, 0

    def spoiled(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return whole(*arguments, **more) * (math.nan if calls == 3 else 1)

    monkeypatch.setattr(step, "flow_term", spoiled)
    config = toy(tmp_path / "run", loss_bins=2, steps=4)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, log_every=4))
    with pytest.raises(step.NonFiniteError):
        train(config)
    train(config)
    train(change(config, out=str(tmp_path / "whole")))
    pair = [(tmp_path / name / "loss_by_t.csv").read_text() for name in ("run", "whole")]
    assert pair[0] == pair[1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_observe_what_one_does(tmp_path: Path, parallel: str) -> None:
    config = toy(tmp_path / "one", steps=1, log_norms=1, loss_bins=3)
    train(config)
    together(2, train_silently, change(config, out=str(tmp_path / "two"), parallel=parallel))
    for name, kind in (("norms.csv", NormRow), ("loss_by_t.csv", BinRow)):
        one, two = rows(tmp_path / "one" / name, kind), rows(tmp_path / "two" / name, kind)
        for expected, found in zip(one, two, strict=True):
            for x, y in zip(expected, found, strict=True):
                if isinstance(x, str):
                    assert x == y
                else:
                    torch.testing.assert_close(torch.tensor(y), torch.tensor(x), equal_nan=True)


def test_a_run_that_goes_on_observes_on(tmp_path: Path) -> None:
    """Also between two rows: what was summed until then is in the checkpoint."""
    settings = {"log_norms": 3, "loss_bins": 3}
    whole = toy(tmp_path / "whole", **settings)
    whole = dataclasses.replace(whole, run=dataclasses.replace(whole.run, log_every=4, steps=9))
    train(whole)
    for steps in (2, 5, 9):
        train(change(whole, out=str(tmp_path / "parts"), steps=steps))
    for name in ("metrics.csv", "norms.csv", "loss_by_t.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row.step for row in rows(tmp_path / "parts/loss_by_t.csv", BinRow)] == [4] * 3 + [8] * 3
    # Another number of bins starts anew, and rows of steps that are done again go.
    earlier = tmp_path / "parts/checkpoints/step-00000006"
    train(change(whole, out=str(tmp_path / "parts"), resume=str(earlier), loss_bins=0, log_norms=0, steps=7))
    assert {row.step for row in rows(tmp_path / "parts/norms.csv", NormRow)} == {3, 6}


def test_sums_of_another_number_of_processes_are_added(tmp_path: Path) -> None:
    config = toy(tmp_path, loss_bins=2)
    network = State(config, ALONE).network
    observations = Observations(config, network, ALONE)
    observations.resume([[[1.0, 2, 3, 4], [5, 6, 7, 8]], [[1.0, 1, 1, 1], [1, 1, 1, 1]]])
    assert observations.unwritten() == [[[2, 3, 4, 5], [6, 7, 8, 9]]]
    other = Observations(toy(tmp_path, loss_bins=3), network, ALONE)
    other.resume(observations.unwritten())
    assert other.unwritten() == [[[0.0] * 4] * 3]
