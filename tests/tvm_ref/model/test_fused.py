"""The fused kernels against the formulas of `dual` in float64: results and all gradients, where they apply and where not.

Without a GPU, Triton interprets the kernels.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tvm_ref.model import blocks
from tvm_ref.model.config import DiTConfig
from tvm_ref.model.dual import Dual
from tvm_ref.model.fused import applies, gelu_operators, heads_operators, stream, stream_operators
from tvm_ref.model.fused.gelu import hidden_layer
from tvm_ref.model.fused.heads import normalised_heads
from tvm_ref.model.fused.stream import Modulation
from tvm_ref.training.parallel import recompute
from verify.budget.network_tolerance import network_budget, relative_error

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = (stream_operators, heads_operators, gelu_operators)
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(applies, "DEVICES", {"cuda", "cpu"})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_formulas(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(applies, "DEVICES", set())
        return call()


class Inputs:
    """Numbers of a standard normal law: the same ones in every type, each time they are drawn in the same order."""

    def __init__(self, dtype: torch.dtype, tangent: bool) -> None:
        self.dtype, self.tangent = dtype, tangent
        self.leaves: dict[str, Tensor] = {}
        self._draw = torch.Generator().manual_seed(7)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers that are the same ones after rounding to half precision."""
        numbers = torch.randn(shape, dtype=torch.float64, generator=self._draw).half()
        return numbers.to(DEVICE, dtype or self.dtype)

    def leaf(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.leaves[name] = self.draw(*shape, dtype=dtype).requires_grad_()
        return self.leaves[name]

    def dual(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Dual:
        value, tangent = (self.leaf(name + suffix, *shape, dtype=dtype) for suffix in ("", "_t"))
        if not self.tangent:
            del self.leaves[f"{name}_t"]
        return Dual(value, tangent if self.tangent else None)


def vectors(inputs: Inputs, channels: int, images: int) -> list[Dual]:
    """Six slices of one tensor, as in a block."""
    packed = inputs.dual("vectors", images, 6, 1, channels)
    return [packed.map(lambda part, i=i: part.select(1, i)) for i in range(6)]


def layer(inputs: Inputs, width: int, out: int) -> nn.Linear:
    made = nn.Linear(width, out, device=DEVICE, dtype=inputs.dtype)
    for name, parameter in made.named_parameters():
        parameter.data = inputs.draw(*parameter.shape) / width**0.5
        inputs.leaves[f"layer.{name}"] = parameter
    return made


def modulated(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x, found = inputs.dual("x", images, tokens, channels), vectors(inputs, channels, images)
    return stream.modulated(x, Modulation(*found[:2]), "rms", eps=EPS, detach=detach)


def added_and_modulated(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x, branch = (inputs.dual(name, images, tokens, channels) for name in ("x", "branch"))
    found = vectors(inputs, channels, images)
    return stream.added_and_modulated(x, found[2], branch, Modulation(*found[3:5]), "rms", eps=EPS, detach=detach)


def added(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x, branch = (inputs.dual(name, images, tokens, channels) for name in ("x", "branch"))
    return (stream.added(x, vectors(inputs, channels, images)[5], branch, detach=detach),)


def heads(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x = inputs.dual("x", images, tokens, 8)
    qkv, weights = layer(inputs, 8, 9 * channels), [inputs.leaf(name, channels) for name in ("q_weight", "k_weight")]
    return normalised_heads(x, qkv, 3, *weights, eps=EPS, detach=detach)


def hidden(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x = inputs.dual("x", images, tokens, 8)
    return (hidden_layer(x, layer(inputs, 8, channels), detach=detach),)


Part = Callable[[Inputs, int, int, int, bool], tuple[Dual, ...]]
PARTS: dict[str, Part] = {f.__name__: f for f in (modulated, added_and_modulated, added, heads, hidden)}


def evaluate(part: Part, sizes: tuple[int, int, int], dtype: torch.dtype, tangent: bool, detach: bool) -> Results:
    """Results, and the gradients of a product of each of them with numbers; not of tangents where they are detached."""
    inputs = Inputs(dtype, tangent)
    duals = part(inputs, *sizes, detach)
    results = {f"{i}{suffix}": z for i, pair in enumerate(duals) for z, suffix in zip(pair, ("", "_t"), strict=True)}
    found = {name: z.detach() for name, z in results.items() if z is not None}
    draw = torch.Generator().manual_seed(8)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for name, z in results.items():
        if z is not None and not (detach and name.endswith("_t")):
            total = total + (z.double() * torch.randn(z.shape, dtype=torch.float64, generator=draw).to(DEVICE)).sum()
    gradients = torch.autograd.grad(total, list(inputs.leaves.values()), allow_unused=True, materialize_grads=True)
    return found | {f"d {name}": d for name, d in zip(inputs.leaves, gradients, strict=True)}


def outside(found: Results, measured: Results, exact: Results, dtype: torch.dtype) -> list[str]:
    """The names of results that are outside the budget of a dtype, which `measured` shows; see verify/model/judge.py."""
    assert found.keys() == measured.keys() == exact.keys()
    some = [name for name in exact if exact[name].any()]
    together = network_budget([measured[name] for name in some], [exact[name] for name in some], dtype, dtype)
    wrong = [name for name in found if name not in some and found[name].any()]
    for name in some:
        budget = max(together, network_budget([measured[name]], [exact[name]], dtype, dtype))
        if not relative_error([found[name]], [exact[name]]) <= budget:
            wrong.append(name)
    return wrong


def judged(
    part: Part, sizes: tuple[int, int, int], tangent: bool, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    found = evaluate(part, sizes, torch.float32, tangent, detach)
    exact, measured = (
        by_formulas(monkeypatch, lambda dtype=dtype: evaluate(part, sizes, dtype, tangent, detach))
        for dtype in (torch.float64, torch.float32)
    )
    return outside(found, measured, exact, torch.float32)


@pytest.mark.parametrize(("tangent", "detach"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(2, 37, 20), (3, 1, 64), (1, 65, 5)])
@pytest.mark.parametrize("part", PARTS)
def test_results_and_gradients_are_those_of_the_formulas(
    part: str, sizes: tuple[int, int, int], tangent: bool, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not judged(PARTS[part], sizes, tangent, detach, monkeypatch)
