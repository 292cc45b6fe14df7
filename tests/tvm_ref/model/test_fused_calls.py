"""Where the fused kernels serve a block: compiled, recomputed, in a training step; and where formulas do instead.

Without a GPU, Triton interprets the kernels.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd import forward_ad

from tests.tvm_ref.runs import change, digits
from tvm_ref.data.dataset import open_dataset
from tvm_ref.model.blocks import DiTBlock
from tvm_ref.model.fused import applies
from tvm_ref.objective.loss import Batch
from tvm_ref.training.batches import Batches
from tvm_ref.training.parallel import World, recompute
from tvm_ref.training.state import State
from tvm_ref.training.step import passes
from verify.budget.network_tolerance import network_budget, relative_error, training_budget
from verify.oracles.network import tiny

KERNELS = {"stream", "heads"}
BACKWARD = {f"{name}_backward" for name in KERNELS}
Run = Callable[..., Any]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(applies, "DEVICES", {"cuda", "cpu"})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks(checkpointing: Any = "none", **config: Any) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList([DiTBlock(tiny(**config))])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    recompute(made, checkpointing)
    return made


def inputs(block: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, c, x_t, c_t."""
    width = block.get_parameter(next(n for n, _ in block.named_parameters() if n.endswith("proj.bias"))).numel()
    draw = torch.Generator().manual_seed(5)
    shapes = [(2, 9, width), (2, width)] * 2
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def derivatives(run: Run, block: nn.Module, given: list[Tensor], detach: bool = False) -> list[Tensor]:
    """Results of a block, and the gradients of inputs and weights."""
    results = [result for result in run(*given, detach)]
    draw = torch.Generator().manual_seed(6)
    weighed = [(z * torch.randn(z.shape, generator=draw).to(z)).sum() for z in results if z.requires_grad]
    leaves = [*given, *block.parameters()]
    gradients = torch.autograd.grad(torch.stack(weighed).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [*(z.detach() for z in results), *gradients]


def by_formulas(monkeypatch: pytest.MonkeyPatch, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(applies, "DEVICES", set())
        return call()


class Recorded:
    """A backend of torch.compile that runs graphs as they are, and knows the operators of tvm_ref that are in them."""

    def __init__(self) -> None:
        self.operators: list[set[str]] = []

    def __call__(self, graph: Any, examples: Any) -> Any:
        recorded = aot_autograd(fw_compiler=self._compile, partition_fn=min_cut_rematerialization_partition)
        return recorded(graph, examples)

    def _compile(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        self.operators.append({t._opname for t in targets if t.namespace == "tvm_ref"})
        return graph


@pytest.mark.sampled(of=3)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_compiled_block_keeps_the_operators_whole(
    interpreted: None, checkpointing: str, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,), recorded = blocks(checkpointing), Recorded()
    given = inputs(block)
    compiled = torch.compile(block, backend=recorded, fullgraph=True, dynamic=False)
    found = derivatives(compiled, block, given, detach)
    forward, backward = recorded.operators
    assert forward == KERNELS and backward >= BACKWARD
    assert (backward & KERNELS == set()) == (checkpointing == "none")
    double = blocks(checkpointing)[0].double()
    exact = derivatives(double, double, inputs(block, torch.float64), detach)
    measured = by_formulas(monkeypatch, lambda: derivatives(block, block, given, detach))
    assert relative_error(found, exact) <= network_budget(measured, exact, torch.float32, torch.float32)
    assert all(map(torch.equal, found, derivatives(block, block, given, detach)))


def test_a_compiled_block_without_tangents_keeps_them_too(interpreted: None) -> None:
    (block,), recorded = blocks(), Recorded()
    x, c, *_ = inputs(block)
    found = torch.compile(block, backend=recorded, fullgraph=True, dynamic=False)(x, c)
    assert recorded.operators == [KERNELS] and torch.equal(found, block(x, c))


def called(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> bool:
    """Whether something runs an operator of tvm_ref."""
    seen = []
    for name in KERNELS:
        module = __import__(f"tvm_ref.model.fused.{name}", fromlist=[name])
        right = getattr(module, name)

        def watched(*given: Any, right: Run = right) -> Any:
            seen.append(right)
            return right(*given)

        monkeypatch.setattr(module, name, watched)
    run()
    return bool(seen)


def test_kernels_serve_a_block_where_they_apply(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks()
    assert called(monkeypatch, lambda: block(*inputs(block)))


def test_formulas_serve_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr(applies, "DEVICES", {"cuda"})
    (block,) = blocks()
    assert not called(monkeypatch, lambda: block(*inputs(block)))


def test_formulas_serve_calls_without_gradients(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks()
    with torch.no_grad():
        assert not called(monkeypatch, lambda: block(*inputs(block)))


def test_formulas_serve_other_types(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks()[0].double()
    assert not called(monkeypatch, lambda: block(*inputs(block, torch.float64)))


def test_formulas_serve_transforms(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks()
    x, c, x_t, c_t = inputs(block)

    def transformed() -> None:
        _, tangent = torch.func.jvp(block, (x, c), (x_t, c_t))
        with forward_ad.dual_level():
            result = block(forward_ad.make_dual(x, x_t), forward_ad.make_dual(c, c_t))
            assert torch.equal(forward_ad.unpack_dual(result).tangent, tangent)
        assert torch.func.vmap(block)(x[:, None], c[:, None]).shape == (2, 1, 9, x.shape[-1])
        torch.func.grad(lambda z: block(z, c).sum())(x)

    assert not called(monkeypatch, transformed)


def test_a_compiled_jvp_of_a_block_takes_the_formulas(interpreted: None) -> None:
    (block,), recorded = blocks(), Recorded()
    x, c, x_t, c_t = inputs(block)

    def jvp(x: Tensor, c: Tensor, x_t: Tensor, c_t: Tensor) -> Any:
        return torch.func.jvp(block, (x, c), (x_t, c_t))

    torch.compile(jvp, backend=recorded, fullgraph=True)(x, c, x_t, c_t)
    assert recorded.operators == [set()]


def test_an_exported_block_holds_operators_of_pytorch_alone(interpreted: None) -> None:
    (block,) = blocks()
    x, c, *_ = inputs(block)
    nodes = torch.export.export(block, (x, c)).graph.nodes
    assert not [node for node in nodes if "tvm_ref" in str(node.target)]


@pytest.mark.parametrize("missing", ["x_t", "c_t"])
def test_a_tangent_that_is_missing_is_zero(interpreted: None, missing: str) -> None:
    (block,) = blocks()
    x, c, x_t, c_t = inputs(block)
    given = {"x_t": x_t, "c_t": c_t}
    found = [z.detach() for z in block(x, c, **(given | {missing: None}))]
    zeros = given | {missing: torch.zeros_like(given[missing])}
    measured = [z.detach() for z in block(x, c, **zeros)]
    double = blocks()[0].double()
    exact = [z.detach() for z in double(x.double(), c.double(), **{name: z.double() for name, z in zeros.items()})]
    assert relative_error(found, exact) <= network_budget(measured, exact, torch.float32, torch.float32)


def test_a_gradient_that_does_not_come_is_zero(interpreted: None) -> None:
    """Of a block's results, one alone is used."""
    (block,) = blocks()
    given = inputs(block)
    leaves = [*given, *block.parameters()]
    for used in range(2):
        found, expected = (
            torch.autograd.grad([block(*given)[used]] if alone else list(block(*given)), leaves, cotangents)
            for alone, cotangents in (
                (True, [torch.ones_like(given[0])]),
                (False, [torch.ones_like(given[0]) * (i == used) for i in range(2)]),
            )
        )
        exact = [z.double() for z in expected]
        assert relative_error(found, exact) <= network_budget(found, exact, torch.float32, torch.float32)


def gradients_of_a_step(config: Any, world: World) -> tuple[list[Tensor], list[Tensor]]:
    """Terms of the loss and gradients of a training step from weights that are not zero."""
    torch.manual_seed(1)
    state, batches = State(config, world), Batches(config, open_dataset(config.data), world)
    for parameter in state.objective.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    (batch,) = (Batch(*(x.to(world.device) for x in batch)) for batch in batches.draw(0))
    terms = passes(state.objective, state.target, batch)
    return [*terms], [p.grad.clone() for p in state.objective.parameters() if p.grad is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_training_step_has_the_gradients_of_the_formulas(
    compiled: bool, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(0, 1, torch.device("cuda"))
    run = {"device": "cuda", "compile": compiled, "checkpointing": checkpointing}
    config = change(digits(Path("run"), **run))
    terms, found = gradients_of_a_step(config, world)
    with monkeypatch.context() as patch:
        patch.setattr(applies, "DEVICES", set())
        torch._dynamo.reset()
        expected_terms, expected = gradients_of_a_step(config, world)
    torch._dynamo.reset()
    budget = training_budget(torch.float32)
    assert relative_error(terms, expected_terms) <= budget and relative_error(found, expected) <= budget
    assert not all(map(torch.equal, found, expected))  # they were computed another way
