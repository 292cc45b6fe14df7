"""Whole networks: right ones hold, and a planted bug of a layer or of the objective is caught in what it spoils."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_ref.model import dual
from tvm_ref.model.dual import Dual
from tvm_ref.objective import loss, parts
from verify.model.cases import PARTS, SMALL, ModelCase
from verify.model.judge import judge_model
from verify.model.stock_norms import stock_norms

QUICK = [
    *(ModelCase(part) for part in PARTS if part != "operators"),  # type: ignore[arg-type]
    ModelCase("tvm", "as a plain DiT", "float32", "tiled"),
    ModelCase("meanflow", "unconditional", "bfloat16", "tiled", recompute="full"),
    ModelCase("tvm", "class-conditional", "bfloat16", "tiled", recompute="selective"),
    ModelCase("tvm", "one block", "float32", "reference", "aot_eager", "selective"),
    ModelCase("func.jvp", "other sizes", "bfloat16"),
]
Planted = dict[str, Callable[..., Any]]


@pytest.mark.sampled(of=2)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_what_is_right_holds(case: ModelCase, seed: int) -> None:
    rows = judge_model(case, "cpu", seed)
    assert {row.quantity for row in rows} >= {"gradients"}
    assert [row for row in rows if not row.ok] == []


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["block", "network", "func.jvp", "tvm", "detached", "meanflow"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_what_is_right_holds_on_a_gpu(part: Any, recompute: Any) -> None:
    if part == "func.jvp" and recompute != "none":
        pytest.skip("torch cannot recompute inside its own JVP")
    for precision in ("float32", "bfloat16"):
        rows = judge_model(ModelCase(part, "class-conditional", precision, "triton", recompute=recompute), "cuda", 0)
        assert [row for row in rows if not row.ok] == []


def rms_norm_without_projection(x: Dual, weight: Tensor | None = None, *, eps: float) -> Dual:
    inverse = torch.rsqrt(x.value.square().mean(-1, keepdim=True) + eps)
    y = x.map(lambda part: part * inverse)
    return y if weight is None else y.map(lambda part: part * weight)


def rms_norm_with_constant_tangent(x: Dual, weight: Tensor | None = None, *, eps: float) -> Dual:
    return RIGHT["rms_norm"](x, weight, eps=eps).detach_tangent()


def modulate_without_scale_tangent(x: Dual, shift: Dual, scale: Dual) -> Dual:
    return RIGHT["modulate"](x, shift, Dual(scale.value))


def residual_without_gate_tangent(x: Dual, gate: Dual, branch: Dual) -> Dual:
    return RIGHT["gated_residual"](x, Dual(gate.value), branch)


def residual_of_the_branch_alone(x: Dual, gate: Dual, branch: Dual) -> Dual:
    return RIGHT["gated_residual"](branch, gate, branch)


def exact_gelu(x: Dual) -> Dual:
    return Dual(*torch.func.jvp(F.gelu, (x.value,), (x.tangent,))) if x.tangent is not None else Dual(F.gelu(x.value))


def attention_without_key_tangent(q: Dual, k: Dual, v: Dual, **options: Any) -> Dual:
    return RIGHT["attention"](q, Dual(k.value), v, **options)


def stock_layer_norm(x: Dual, *, eps: float) -> Dual:
    def norm(z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], eps=eps)

    return Dual(norm(x.value)) if x.tangent is None else Dual(*torch.func.jvp(norm, (x.value,), (x.tangent,)))


RIGHT: Planted = {name: getattr(dual, name) for name in ("rms_norm", "modulate", "gated_residual", "attention")}
FAULTS: list[tuple[str, Callable[..., Any], str, set[str]]] = [
    ("rms_norm", rms_norm_without_projection, "class-conditional", {"tangent", "gradients"}),
    ("rms_norm", rms_norm_with_constant_tangent, "class-conditional", {"gradients"}),
    ("modulate", modulate_without_scale_tangent, "class-conditional", {"tangent", "gradients"}),
    ("gated_residual", residual_without_gate_tangent, "class-conditional", {"tangent", "gradients"}),
    ("gated_residual", residual_of_the_branch_alone, "class-conditional", {"value", "tangent", "gradients"}),
    ("gelu", exact_gelu, "class-conditional", {"value", "tangent", "gradients"}),
    ("attention", attention_without_key_tangent, "class-conditional", {"tangent", "gradients"}),
    ("layer_norm", stock_layer_norm, "layer norm", {"gradients"}),
]


@pytest.mark.parametrize(
    ("name", "wrong", "network", "quantities"), FAULTS, ids=[fault[1].__name__ for fault in FAULTS]
)
@pytest.mark.parametrize("part", ["block", "network"])
def test_a_planted_bug_of_a_layer_is_caught_in_what_it_spoils(
    monkeypatch: pytest.MonkeyPatch, part: Any, name: str, wrong: Callable[..., Any], network: str, quantities: set[str]
) -> None:
    monkeypatch.setattr(dual, name, wrong)
    rows = judge_model(ModelCase(part, network), "cpu", 0)
    assert {row.quantity for row in rows if not row.ok} == quantities
    assert not all(row.ok for row in judge_model(ModelCase("tvm", network), "cpu", 0))


@pytest.mark.parametrize("wrong", [rms_norm_with_constant_tangent, stock_layer_norm])
def test_difference_quotients_catch_wrong_gradients_without_the_dense_network(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    """Where the JVP itself is right: one that is wrong may have the gradient that belongs to it."""
    monkeypatch.setattr(dual, "layer_norm" if wrong is stock_layer_norm else "rms_norm", wrong)
    (row,) = judge_model(ModelCase("difference", "layer norm"), "cpu", 0)
    assert not row.ok


def test_a_planted_bug_of_the_objective_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = parts.guided_of

    def slightly_off(batch: Any, velocity: Any) -> Tensor:
        return right(batch, velocity) + 1e-6 * batch.x1

    for module in (parts, loss):
        monkeypatch.setattr(module, "guided_of", slightly_off)
    for case in (ModelCase("tvm"), ModelCase("meanflow")):
        assert not all(row.ok for row in judge_model(case, "cpu", 0))


def test_a_lost_gradient_through_the_jvp_is_caught_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "attention", lambda q, k, v, **options: RIGHT["attention"](
        q.detach_tangent(), k.detach_tangent(), v.detach_tangent(), **options))  # fmt: skip
    rows = judge_model(ModelCase("network", precision="bfloat16"), "cpu", 0)
    assert {row.quantity for row in rows if not row.ok} == {"gradients"}


@pytest.mark.parametrize("network", SMALL)
def test_no_network_calls_a_norm_of_torch(network: str) -> None:
    (row,) = judge_model(ModelCase("operators", network), "cpu", 0)
    assert row.ok, row.reason


def test_a_network_that_calls_a_norm_of_torch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "layer_norm", stock_layer_norm)
    (row,) = judge_model(ModelCase("operators", "as a plain DiT"), "cpu", 0)
    assert not row.ok
    assert "native_layer_norm" in row.reason
    (row,) = judge_model(ModelCase("operators", "class-conditional"), "cpu", 0)
    assert row.ok


@pytest.mark.parametrize(
    ("norm", "caught"),
    [
        (torch.nn.LayerNorm(4), True),
        (torch.nn.BatchNorm1d(4), True),
        (torch.nn.BatchNorm1d(4).eval(), True),
        (torch.nn.RMSNorm(4), False),
        (torch.nn.GroupNorm(2, 4), False),
    ],
    ids=str,
)
def test_norms_are_seen_plain_under_jvp_and_without_grad(norm: torch.nn.Module, caught: bool) -> None:
    x = torch.randn(3, 4)
    with stock_norms() as plain:
        norm(x)
    with stock_norms() as dual_:
        torch.func.jvp(lambda z: torch.func.functional_call(norm, state(norm), z), (x,), (x,))
    with stock_norms() as inference, torch.no_grad():
        norm(x)
    assert [bool(found) for found in (plain, dual_, inference)] == [caught] * 3


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in (*module.named_parameters(), *module.named_buffers())}
