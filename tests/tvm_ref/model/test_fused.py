"""The fused kernels against the formulas of `dual` in float64: results and all gradients, and planted faults.

Without a GPU, Triton interprets the kernels.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvm_ref.model.dual import Dual
from tvm_ref.model.fused import applies, kernels, stream
from tvm_ref.model.fused.heads import normalised_heads
from tvm_ref.model.fused.stream import Modulation
from verify.budget.network_tolerance import network_budget, relative_error

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applies, "DEVICES", {"cuda", "cpu"})


def by_formulas(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(applies, "DEVICES", set())
        return call()


class Inputs:
    """Numbers of a standard normal law: the same ones in every type, each time they are drawn in the same order.

    half: the type of branches, residual: that of x; where these are not the dtype of everything else.
    """

    def __init__(
        self, dtype: torch.dtype, half: torch.dtype | None, tangent: bool, residual: torch.dtype | None = None
    ) -> None:
        self.dtype, self.half, self.tangent = dtype, half or dtype, tangent
        self.residual = residual or dtype
        self.leaves: dict[str, Tensor] = {}
        self._draw = torch.Generator().manual_seed(7)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self._draw).bfloat16().to(DEVICE, self.dtype)

    def leaf(self, name: str, *shape: int) -> Tensor:
        self.leaves[name] = self.draw(*shape).requires_grad_()
        return self.leaves[name]

    def dual(self, name: str, *shape: int) -> Dual:
        value, tangent = self.draw(*shape), self.draw(*shape)
        self.leaves[name] = value.requires_grad_()
        if self.tangent:
            self.leaves[f"{name}_t"] = tangent.requires_grad_()
        return Dual(value, tangent if self.tangent else None)

    def stream(self, *shape: int) -> Dual:
        return self.dual("x", *shape).map(lambda part: part.to(self.residual))


def vectors(inputs: Inputs, channels: int, images: int) -> list[Dual]:
    """Six slices of one tensor, as in a block."""
    packed = inputs.dual("vectors", images, 6, 1, channels)
    return [packed.map(lambda part, i=i: part.select(1, i)) for i in range(6)]


def modulated(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x, found = inputs.stream(images, tokens, channels), vectors(inputs, channels, images)
    return stream.modulated(x, Modulation(*found[:2]), "rms", eps=EPS, detach=detach)


def added_and_modulated(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x, branch = inputs.stream(images, tokens, channels), inputs.dual("branch", images, tokens, channels)
    branch = branch.map(lambda part: part.to(inputs.half))
    found = vectors(inputs, channels, images)
    return stream.added_and_modulated(x, found[2], branch, Modulation(*found[3:5]), "rms", eps=EPS, detach=detach)


def added(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    x, branch = inputs.stream(images, tokens, channels), inputs.dual("branch", images, tokens, channels)
    branch = branch.map(lambda part: part.to(inputs.half))
    return (stream.added(x, vectors(inputs, channels, images)[5], branch, detach=detach),)


def heads(inputs: Inputs, images: int, tokens: int, channels: int, detach: bool) -> tuple[Dual, ...]:
    qkv = inputs.dual("qkv", images, tokens, 9 * channels).map(lambda part: part.to(inputs.half))
    weights = [inputs.leaf(name, channels) for name in ("q_weight", "k_weight")]
    return normalised_heads(qkv, 3, *weights, eps=EPS, detach=detach)


Part = Callable[[Inputs, int, int, int, bool], tuple[Dual, ...]]
PARTS: dict[str, Part] = {f.__name__: f for f in (modulated, added_and_modulated, added, heads)}


def evaluate(
    part: Part, sizes: tuple[int, int, int], dtype: torch.dtype, half: torch.dtype | None, tangent: bool, detach: bool,
    residual: torch.dtype | None = None,
) -> Results:  # fmt: skip
    """Results, and the gradients of a product of each of them with numbers; not of tangents where they are detached.

    half: the type of autocast. residual: that of the stream, if it is not dtype.
    """
    inputs = Inputs(dtype, half, tangent, residual)
    with torch.autocast(DEVICE, half or torch.bfloat16, enabled=half is not None):
        duals = part(inputs, *sizes, detach)
    results = {f"{i}{suffix}": z for i, pair in enumerate(duals) for z, suffix in zip(pair, ("", "_t"), strict=True)}
    found = {name: z.detach() for name, z in results.items() if z is not None}
    if part is not heads:
        assert {z.dtype for z in duals[0] if z is not None} == {inputs.residual}
    draw = torch.Generator().manual_seed(8)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for name, z in results.items():
        if z is not None and not (detach and name.endswith("_t")):
            total = total + (z.double() * torch.randn(z.shape, dtype=torch.float64, generator=draw).to(DEVICE)).sum()
    gradients = torch.autograd.grad(total, list(inputs.leaves.values()), allow_unused=True, materialize_grads=True)
    return found | {f"d {name}": d for name, d in zip(inputs.leaves, gradients, strict=True)}


def outside(found: Results, measured: Results, exact: Results, dtype: torch.dtype) -> list[str]:
    """The names of results outside the budget of a dtype, which `measured` shows, as in verify/model/judge.py."""
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
    monkeypatch: pytest.MonkeyPatch, part: str, sizes: tuple[int, int, int], half: torch.dtype | None, *how: bool,
    residual: torch.dtype | None = None,
) -> list[str]:  # fmt: skip
    """What is wrong of a part with kernels. how: with tangents, detached. residual: as in `evaluate`."""
    found = evaluate(PARTS[part], sizes, torch.float32, half, *how, residual)
    exact = by_formulas(monkeypatch, lambda: evaluate(PARTS[part], sizes, torch.float64, None, *how))
    measured = by_formulas(monkeypatch, lambda: evaluate(PARTS[part], sizes, torch.float32, half, *how, residual))
    return outside(found, measured, exact, half or torch.float32)


@pytest.mark.sampled(of=4)
@pytest.mark.parametrize(("tangent", "detach"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(2, 37, 20), (3, 1, 64), (1, 65, 5)])
@pytest.mark.parametrize("part", PARTS)
def test_results_and_gradients_are_those_of_the_formulas(
    part: str, sizes: tuple[int, int, int], tangent: bool, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not judged(monkeypatch, part, sizes, None, tangent, detach)


@pytest.mark.parametrize("part", PARTS)
def test_in_autocast_they_lose_no_more_than_the_formulas(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not judged(monkeypatch, part, (2, 20, 12), torch.float16, True, False)


@pytest.mark.parametrize(("tangent", "detach"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("part", ["modulated", "added_and_modulated", "added"])
def test_a_stream_of_a_half_type_stays_one(
    part: str, tangent: bool, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = torch.float16
    assert not judged(monkeypatch, part, (2, 20, 12), half, tangent, detach, residual=half)


def test_without_autocast_a_stream_of_a_half_type_has_normalised_rows_in_float32() -> None:
    _, inner = modulated(Inputs(torch.float32, None, True, torch.float16), 2, 4, 8, False)
    assert {part.dtype for part in inner} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize(("tangent", "detach"), [(False, False), (True, False)])
@pytest.mark.parametrize("part", PARTS)
def test_in_autocast_on_a_gpu_at_the_width_of_a_network(
    part: str, tangent: bool, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = 64 if part == "heads" else 1152
    assert not judged(monkeypatch, part, (3, 256, channels), torch.bfloat16, tangent, detach)
    residual = torch.bfloat16
    assert not judged(monkeypatch, part, (3, 256, channels), torch.bfloat16, tangent, detach, residual=residual)


FAULTS = [
    ("stream", "row_t += g_t * b + g *", "row_t += g *", "added"),
    ("stream", "n * gain_t + offset_t", "offset_t", "modulated"),
    ("stream", "slope * r / C)) * r", "slope * r / C))", "modulated"),
    ("stream", "- 3 * a * s * r", "- 2 * a * s * r", "modulated"),
    ("stream", " - (s * r) * row_t", "", "modulated"),
    ("stream", "d_inner * n + d_inner_t * n_t", "d_inner * n", "modulated"),
    ("stream", "row_t += g_t * b + g * b_t", "row_t += g * b_t", "added_and_modulated"),
    ("stream", "sum_g += d_t * b_t", "pass", "added"),
    ("stream", "d * g + d_t * g_t", "d * g", "added"),
    ("stream", "tl.minimum(first + ROWS, N)", "tl.minimum(first + ROWS, N - 1)", "modulated"),
    ("heads", "of_weight += d_t * n_t", "pass", "heads"),
    ("heads", "- 2 * a * s * r", "- a * s * r", "heads"),
    ("heads", "(dn_t * a + x_t * s) * r", "dn_t * a * r", "heads"),
    ("heads", "_load(dv, single, inside), inside)", "2 * _load(dv, single, inside), inside)", "heads"),
    ("heads", "row // H * 3 * H", "row // H * 2 * H", "heads"),
]


@pytest.mark.sampled(of=4)
@pytest.mark.parametrize(("file", "right", "wrong", "part"), FAULTS)
def test_planted_faults_are_seen(
    file: str, right: str, wrong: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Path(kernels.__path__[0], f"{file}.py").read_text()
    assert right in source
    (tmp_path / f"{file}.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"faulty_{file}", tmp_path / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, f"{kernels.__name__}.{file}", module)
    assert judged(monkeypatch, part, (2, 33, 8), None, True, False)
