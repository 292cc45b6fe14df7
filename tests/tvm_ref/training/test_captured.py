"""A step as a CUDA graph does what the step does kernel by kernel, and is refused where it could not."""

from pathlib import Path

import pytest
import torch

from tests.tvm_ref.runs import change, digits
from tvm_ref.data.dataset import open_dataset
from tvm_ref.objective.loss import Batch
from tvm_ref.training.batches import Batches
from tvm_ref.training.captured import WARM
from tvm_ref.training.config import ConfigError, RunConfig, TrainConfig
from tvm_ref.training.parallel import World
from tvm_ref.training.state import State
from tvm_ref.training.step import Outcome, gradient

CONFIG = digits(Path("run"))


def trained(config: TrainConfig, world: World, steps: int) -> tuple[State, list[Outcome]]:
    state, batches = State(config, world), Batches(config, open_dataset(config.data), world)
    outcomes = []
    for step in range(steps):
        draws = [Batch(*(x.to(world.device) for x in batch)) for batch in batches.draw(step)]
        outcomes.append(gradient(state.objective, state.target, draws, world, captured=state.captured))
        state.advance()
    return state, outcomes


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_replays_give_the_same_bits(checkpointing: str) -> None:
    world = World(0, 1, torch.device("cuda"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (one, plain), (two, captured) = (
            trained(change(CONFIG, cuda_graph=graph, checkpointing=checkpointing, device="cuda"), world, WARM + 4)
            for graph in (False, True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert two.captured is not None and two.captured._graph is not None
    assert captured == plain and len({outcome.loss for outcome in plain}) == WARM + 4
    for copy in ("network", "target", "average"):
        weights = [[*getattr(state, copy).parameters()] for state in (one, two)]
        assert all(map(torch.equal, *weights))


def test_a_graph_needs_a_gpu_and_one_process() -> None:
    for world, words in ((World(0, 1, torch.device("cpu")), "True on cpu"), (World(0, 2, torch.device("cuda")), "2")):
        with pytest.raises(ConfigError, match=f"run.cuda_graph: expected False .* got .*{words}"):
            State(change(CONFIG, cuda_graph=True), world)


@pytest.mark.parametrize("setting", ["accumulate", "log_norms"])
def test_what_a_graph_cannot_do_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"run.cuda_graph: expected False .*run.{setting}"):
        RunConfig(steps=1, batch=4, out="run", cuda_graph=True, **{setting: 2})
