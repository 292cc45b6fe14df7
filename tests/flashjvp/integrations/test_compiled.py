"""torch.compile traces what was replaced, and compiles anew where a thread's contexts are others."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashjvp
from tests.flashjvp.integrations.exact import BAR, B, D, N, Timed, normal, objectives, stock_math, worst

ROOT = Path(__file__).resolve().parents[3]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(D, 3 * D), nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled_jvp(model: nn.Module) -> Callable[..., Tensor]:
    """The model, compiled; the JVP is taken inside."""

    def both(x: Tensor, t: Tensor, x_t: Tensor, t_t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(model, (x, t), (x_t, t_t))  # type: ignore[return-value]

    return torch.compile(both, backend="aot_eager", fullgraph=True)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("when", ["always", pytest.param("jvp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", [Block, pytest.param(encoder, marks=pytest.mark.slow)])
def test_compiled_model_is_right(when: str, network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Timed(network().double()), normal(B, N, D)
    parameters = list(model.parameters())
    with stock_math():
        expected = objectives(model, parameters, x)
    compiled = compiled_jvp(model)
    with flashjvp.replaced(model, when=when) as replaced:
        found = objectives(model, parameters, x, lambda _, primals, tangents: compiled(*primals, *tangents))
    assert worst(found, expected) < BAR
    rows = {(row.function, row.served_by) for row in replaced.report().rows}
    assert {("scaled_dot_product_attention", "flashjvp"), ("layer_norm", "flashjvp")} <= rows
    assert any("torch.compile" in row.why for row in replaced.report().rows)


def test_compiled_code_follows_the_contexts() -> None:
    q = normal(1, 2, 4, 8)
    ran: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        is_ours = any("flashjvp" in str(node.target) for node in graph.graph.nodes)

        def run(*args: Tensor) -> object:
            ran.append(is_ours)
            return graph.forward(*args)

        return run

    @torch.compile(backend=backend, fullgraph=True)
    def f(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q) + 1

    expected = f(q)
    for _ in range(2):
        with flashjvp.replaced():
            torch.testing.assert_close(f(q), expected)
            with flashjvp.replaced(fallback="dense"):
                f(q)
        f(q)
    assert ran == [False, True, True, False, True, True, False]


@pytest.mark.slow
def test_a_compiler_that_is_first_imported_inside() -> None:
    """Its tables of functions are made then, from the names that are replaced."""
    program = """
import sys, torch, flashjvp
from torch.nn import functional as F
assert "torch._dynamo" not in sys.modules
x = torch.randn(2, 2, 4, 8, dtype=torch.float64)

def f(x):
    return F.layer_norm(F.scaled_dot_product_attention(x, x, x), (8,))

def jvp(x):
    return torch.func.jvp(f, (x,), (x.cos(),))

with flashjvp.replaced():
    expected = jvp(x)
    for y, z in zip(torch.compile(jvp, backend="aot_eager")(x), expected):
        torch.testing.assert_close(y, z)
    inside = torch.compile(f, backend="aot_eager")(x)
outside = torch.compile(f, backend="aot_eager")(x)
torch.testing.assert_close(inside, outside)
torch.testing.assert_close(f(x), outside)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
