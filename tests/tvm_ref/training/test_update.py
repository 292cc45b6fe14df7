"""AdamW and both averages in one pass are those of PyTorch, weight by weight; without a GPU in Triton's interpreter."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tvm_ref.runs import toy
from tvm_ref.training import state as state_module
from tvm_ref.training.config import OptimConfig
from tvm_ref.training.parallel import World
from tvm_ref.training.state import State
from tvm_ref.training.update import BLOCK, FusedUpdate, Rates
from verify.budget.network_tolerance import network_budget, relative_error, training_budget

SIZES = ((3,), (BLOCK,), (BLOCK + 1, 2), (1, 1), (0,))
RATES = {"lr": 0.1, "beta1": 0.8, "beta2": 0.7, "eps": 0.01, "weight_decay": 0.3}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIM = OptimConfig(lr=0.1, betas=(0.8, 0.7), eps=0.01, weight_decay=0.3, target_ema=0.9, ema=0.6)


def tensors(seed: int) -> list[list[Tensor]]:
    """Weights, both moments and both averages, before the first step."""
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, generator=draw).to(DEVICE) for size in SIZES]
    zeros = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    return [weights, *zeros, *([torch.randn(w.shape, generator=draw).to(DEVICE) for w in weights] for _ in range(2))]


def gradients(step: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=draw).to(DEVICE) for size in SIZES]


def by_pytorch(given: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Three steps of PyTorch's AdamW and of the averages: weights, moments, averages, in one list."""
    weights, _, _, targets, averages = ([x.to(dtype) for x in of] for of in given)
    parameters = [torch.nn.Parameter(w) for w in weights]
    options = {"lr": RATES["lr"], "eps": RATES["eps"], "weight_decay": RATES["weight_decay"]}
    optimizer = torch.optim.AdamW(parameters, betas=(RATES["beta1"], RATES["beta2"]), **options)
    for step in range(1, 4):
        for p, gradient in zip(parameters, gradients(step), strict=True):
            p.grad = gradient.to(dtype)
        optimizer.step()
        for of, rate in ((targets, 0.9), (averages, 0.6)):
            torch._foreach_lerp_(of, [p.detach() for p in parameters], 1 - rate)
    moments, squares = ([optimizer.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))
    return [*(p.detach() for p in parameters), *moments, *squares, *targets, *averages]


def by_one_pass(given: list[list[Tensor]], finite: bool = True, offset: int = 0) -> list[Tensor]:
    """offset: how many numbers of a buffer stand before each gradient, as in DDP's buckets."""
    update = FusedUpdate(*given)
    for step in range(1, 4):
        rates = Rates(**RATES, step=step, target_rate=0.9, average_rate=0.6)
        buffers = [torch.cat([x.new_zeros(offset), x.flatten()]) for x in gradients(step)]
        views = [x[offset:].view(size) for x, size in zip(buffers, SIZES, strict=True)]
        update(views, rates, torch.tensor(finite, device=DEVICE))
    return [x for of in given for x in of]


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 0), (2, 1)])
def test_three_steps_are_those_of_pytorch(seed: int, offset: int) -> None:
    exact, measured = (by_pytorch(tensors(seed), dtype) for dtype in (torch.float64, torch.float32))
    found = by_one_pass(tensors(seed), offset=offset)
    for i, (one, of) in enumerate(zip(found, exact, strict=True)):
        if of.numel():
            budget = network_budget([measured[i]], [of], torch.float32, torch.float32)
            assert relative_error([one], [of]) <= budget, i


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    given, before = tensors(0), tensors(0)
    given[0][0][0] = before[0][0][0] = math.inf
    by_one_pass(given, finite=False)
    assert all(map(torch.equal, (x for of in given for x in of), (x for of in before for x in of)))


def trained(out: Path, finite: Sequence[bool]) -> State:
    """The state after some steps with random gradients."""
    state = State(dataclasses.replace(toy(out), optim=OPTIM), World(0, 1, DEVICE))
    draw = torch.Generator().manual_seed(0)
    for is_finite in finite:
        for p in state.parameters:
            p.grad = torch.randn(p.shape, generator=draw).to(DEVICE) if is_finite else torch.full_like(p, math.nan)
        state.advance(torch.tensor(is_finite, device=DEVICE))
        if not is_finite:
            state.take_back()
    return state


def everything(state: State) -> list[Tensor]:
    return [x.clone() for x in state.tensors().values()]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_the_state_by_one_kernel_is_that_of_several(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "fuses", lambda state: False)
    several = trained(tmp_path, [True] * 3)
    monkeypatch.setattr(state_module, "fuses", lambda state: fused)
    one = trained(tmp_path, [True, True, False, True])
    assert (one._fused is not None) is fused and one.step == several.step == 3
    assert one.tensors().keys() == several.tensors().keys()
    for name, value in several.tensors().items():
        assert relative_error([one.tensors()[name]], [value]) <= training_budget(torch.float32), name
    before = everything(one)
    for p in one.parameters:
        p.grad = torch.full_like(p, math.nan)
    one.advance(torch.tensor(False, device=DEVICE))
    assert all(map(torch.equal, everything(one), before))


def test_only_contiguous_float32_of_a_gpu_is_updated_by_one_kernel(tmp_path: Path) -> None:
    assert (trained(tmp_path, [True] * 2)._fused is not None) is (DEVICE.type == "cuda")
