"""What a step does to the network, the target network and the EMA weights, in float64."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tvm_ref.runs import toy
from tvm_ref.training.config import OptimConfig
from tvm_ref.training.parallel import World
from tvm_ref.training.state import State
from verify.budget.network_tolerance import relative_error, training_budget

OPTIM = OptimConfig(lr=0.1, betas=(0.8, 0.7), eps=0.01, weight_decay=0.3, target_ema=0.9, ema=0.6)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Sets the dtype of the networks."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_step_is_that_of_adamw_and_both_averages_follow_at_their_rates() -> None:
    """Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2, for a random gradient in each of three steps."""
    state = State(dataclasses.replace(toy(Path("run")), optim=OPTIM), World(0, 1, torch.device("cpu")))
    weights = [p.detach().clone() for p in state.parameters]
    targets, averages = ([p.clone() for p in weights] for _ in range(2))
    first, second = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    for step in range(1, 4):
        gradients = [torch.randn_like(p) for p in weights]
        for p, gradient in zip(state.parameters, gradients, strict=True):
            p.grad = gradient.clone()
        assert state.advance() == OPTIM.lr and state.step == step
        for i, gradient in enumerate(gradients):
            first[i] = 0.8 * first[i] + 0.2 * gradient
            second[i] = 0.7 * second[i] + 0.3 * gradient.square()
            mean, square = first[i] / (1 - 0.8**step), second[i] / (1 - 0.7**step)
            weights[i] = weights[i] - 0.1 * (mean / (square.sqrt() + 0.01) + 0.3 * weights[i])
            targets[i] = 0.9 * targets[i] + 0.1 * weights[i]
            averages[i] = 0.6 * averages[i] + 0.4 * weights[i]
    trained = [p.requires_grad for p in state.network.parameters()]
    for module, expected in ((state.network, weights), (state.target, targets), (state.average, averages)):
        found = [p.detach() for p, is_trained in zip(module.parameters(), trained, strict=True) if is_trained]
        assert relative_error(found, expected) <= training_budget()


def test_the_optimizer_is_fused() -> None:
    state = State(toy(Path("run")), World(0, 1, torch.device("cpu")))
    assert all(group["fused"] for group in state.optimizer.param_groups)
