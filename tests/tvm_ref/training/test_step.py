"""The gradient of a step, however it is computed: micro-batches, recomputation, compilation, clipping, autocast.

Everything is in float64 (torch's default type decides), where two correct ways differ by a little more than 1e-16.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tvm_ref.runs import change, digits
from tvm_ref.data.dataset import open_dataset
from tvm_ref.model.dual import Dual
from tvm_ref.objective.loss import Batch
from tvm_ref.training.batches import Batches
from tvm_ref.training.config import ConfigError, TrainConfig
from tvm_ref.training.parallel import World
from tvm_ref.training.state import State
from tvm_ref.training.step import Outcome, gradient, passes, queue_gradient
from verify.budget.network_tolerance import relative_error, training_budget

CONFIG = digits(Path("run"))
ALONE = World(0, 1, torch.device("cpu"))
DATASET = open_dataset(CONFIG.data)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Sets the dtype of networks and batches."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(config: TrainConfig, steps: int = 3) -> tuple[State, list[Outcome]]:
    """Trains some steps of `config`; returns the state and the results of the steps."""
    state, batches = State(config, ALONE), Batches(config, DATASET, ALONE)
    outcomes = []
    for step in range(steps):
        outcomes.append(gradient(state.objective, state.target, batches.draw(step), ALONE, clip=config.optim.clip))
        state.advance()
    return state, outcomes


def assert_same(config: TrainConfig, other: TrainConfig) -> None:
    """Asserts that both give the same losses, gradient norms and weights up to rounding."""
    (one, losses), (two, other_losses) = trained(config), trained(other)
    assert relative_error(*(torch.tensor(x).unbind() for x in (other_losses, losses))) <= training_budget()
    for copy in ("network", "target", "average"):
        weights = [list(getattr(state, copy).parameters()) for state in (two, one)]
        assert relative_error(*weights) <= training_budget()


@pytest.mark.parametrize("accumulate", [2, 6])
def test_micro_batches_equal_the_large_batch(accumulate: int) -> None:
    assert_same(CONFIG, change(CONFIG, accumulate=accumulate))


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_changes_nothing(kind: str) -> None:
    assert_same(CONFIG, change(CONFIG, checkpointing=kind))


def test_compiled_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tracing and the derivative of it are the compiler's part that can be wrong here; code generation is slow.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    shallow = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, depth=1))
    assert_same(shallow, change(shallow, checkpointing="selective", compile=True))


class Passes(TorchDispatchMode):
    """Notes the passes of attention in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().startswith("flashjvp::"):
            self.found.append(function.name().removeprefix("flashjvp::").split(".")[0])
        return function(*args, **(kwargs or {}))


def test_the_first_term_is_differentiated_before_the_second_is_computed() -> None:
    state, (batch,) = State(CONFIG, ALONE), Batches(CONFIG, DATASET, ALONE).draw(0)
    for parameter in state.parameters:  # the output layer starts at zero
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 8
    whole = state.objective(batch, state.target)
    expected = torch.autograd.grad(whole.loss.mean(), state.parameters)
    with Passes() as seen:
        found = passes(state.objective, state.target, batch)
    assert all(map(torch.equal, found, whole))
    gradients = [p.grad for p in state.parameters if p.grad is not None]
    assert relative_error(gradients, list(expected)) <= training_budget()
    depth = CONFIG.model.depth
    kinds = ["forward_jvp", "forward", "backward_jvp", "forward", "backward"]  # the second one is the target's
    assert seen.found == [kind for kind in kinds for _ in range(depth)]


def test_a_gradient_is_clipped_to_the_limit() -> None:
    state, batches = State(CONFIG, ALONE), Batches(CONFIG, DATASET, ALONE).draw(0)
    free = gradient(state.objective, state.target, batches, ALONE)
    whole = torch.cat([p.grad.flatten() for p in state.parameters])  # type: ignore[union-attr]
    assert relative_error([torch.tensor(free.gradient_norm)], [whole.norm()]) <= training_budget()
    limit = free.gradient_norm / 4
    clipped = gradient(state.objective, state.target, batches, ALONE, clip=limit)
    assert clipped == free
    cut = torch.cat([p.grad.flatten() for p in state.parameters])  # type: ignore[union-attr]
    quarter = limit / (free.gradient_norm + 1e-6)  # PyTorch's guard against a norm of zero
    assert relative_error([cut], [whole * quarter]) <= training_budget()
    gradient(state.objective, state.target, batches, ALONE, clip=4 * free.gradient_norm)
    assert torch.equal(torch.cat([p.grad.flatten() for p in state.parameters]), whole)  # type: ignore[union-attr]


def test_the_learning_rate_rises_linearly() -> None:
    state, batches = State(CONFIG, ALONE), Batches(CONFIG, DATASET, ALONE)
    rates = []
    for step in range(5):
        gradient(state.objective, state.target, batches.draw(step), ALONE)
        rates.append(state.advance())
    top = CONFIG.optim.lr
    assert rates == [top * (1 / 3), top * (2 / 3), top, top, top]


def test_the_target_gets_no_gradient() -> None:
    state, batches = State(CONFIG, ALONE), Batches(CONFIG, DATASET, ALONE).draw(0)
    gradient(state.objective, state.target, batches, ALONE)
    assert all(p.grad is None for copy in (state.target, state.average) for p in copy.parameters())
    assert all(p.grad is not None for p in state.parameters)
    ids = {id(p) for p in state.objective.parameters()}
    assert not any(id(p) in ids for p in state.target.parameters())


def append_tokens(seen: list[Dual], _: int, tokens: Dual) -> None:
    seen.append(tokens)


@pytest.mark.parametrize(
    ("lower", "residual"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"),
                            ("float8", "float32"), ("float8", "bfloat16")],
)  # fmt: skip
def test_lower_precisions_are_of_the_same_loss(lower: str, residual: str) -> None:
    torch.set_default_dtype(torch.float32)
    outcomes, norms = {}, {}
    wider = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=16))
    for precision, of_stream in (("float32", "float32"), (lower, residual)):
        config = change(wider, precision=precision, residual=of_stream)
        state, batches = State(config, ALONE), Batches(config, DATASET, ALONE).draw(0)
        with torch.no_grad():  # the output layer starts at zero, where precision would not show
            for copy in (state.network, state.target):
                for p in copy.parameters():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) / 8)
        seen: list[Dual] = []
        for copy in (state.network, state.target):
            copy.watch = functools.partial(append_tokens, seen)
        outcomes[precision] = gradient(state.objective, state.target, batches, ALONE)
        assert {part.dtype for tokens in seen for part in tokens if part is not None} == {getattr(torch, of_stream)}
        grads = [p.grad for p in state.parameters if p.grad is not None and p.grad.dtype == torch.float32]
        assert len(grads) == len(state.parameters)
        norms[precision] = torch.stack([x.norm() for x in grads])
    error = relative_error([torch.tensor(outcomes[lower].loss)], [torch.tensor(outcomes["float32"].loss)])
    assert 0 < error <= training_budget(DTYPES[lower])
    assert relative_error([norms[lower]], [norms["float32"]]) < 0.1  # float16's scale of the loss is taken out


def test_float32_and_tf32_are_what_pytorch_calls_them() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("float32", "bfloat16"):
            torch.set_float32_matmul_precision("medium")
            State(change(CONFIG, precision=precision), ALONE)
            assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(ConfigError, match=r"run\.precision: expected another one than tf32 on cpu"):
            State(change(CONFIG, precision="tf32"), ALONE)
    finally:
        torch.set_float32_matmul_precision(before)


def test_float8_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ConfigError, match=r"run\.precision: expected another one than float8 where 16 does not divide"):
        State(change(CONFIG, precision="float8"), ALONE)
    wider = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, width=16))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"float8 without torchao: pip install 'flashjvp\[float8\]'"):
        State(change(wider, precision="float8"), ALONE)


class Waits(TorchDispatchMode):
    """Refuses what waits for a device: numbers read by the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith(("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero")):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["tvm", "flow", "meanflow"])
def test_the_work_of_a_step_is_queued_without_waiting_for_the_device(objective: Any) -> None:
    config = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, objective=objective))
    state, batches = State(config, ALONE), Batches(config, DATASET, ALONE).draw(0)
    with Waits():
        queued = queue_gradient(state.objective, state.target, batches, ALONE, clip=config.optim.clip)
    assert bool(queued.finite)
    with pytest.raises(AssertionError, match="waits for the device"), Waits():
        bool(queued.finite)
    assert queued.outcome() == gradient(state.objective, state.target, batches, ALONE, clip=config.optim.clip)


def test_a_stop_is_seen_after_the_step() -> None:
    state, batches = State(CONFIG, ALONE), Batches(CONFIG, DATASET, ALONE).draw(0)
    assert gradient(state.objective, state.target, batches, ALONE, stop=lambda: True).stop
    assert not gradient(state.objective, state.target, batches, ALONE).stop


def test_batches_stay_as_they_were() -> None:
    state, batches = State(CONFIG, ALONE), Batches(CONFIG, DATASET, ALONE).draw(0)
    before = [Batch(*(x.clone() for x in batch)) for batch in batches]
    gradient(state.objective, state.target, batches, ALONE)
    assert all(torch.equal(x, y) for a, b in zip(batches, before, strict=True) for x, y in zip(a, b, strict=True))
