"""Each layer on (value, tangent) pairs against torch.func.jvp of its formula: values, tangents and all gradients."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_ref.model import dual
from tvm_ref.model.dual import Dual
from verify.budget.network_tolerance import network_budget, relative_error

EPS = 1e-6
WEIGHT, BIAS, GAIN = (
    torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for shape in ((5, 6), (5,), (6,))
)
FREQUENCIES = torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)


def written_out_layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def tanh_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


LAYERS: dict[str, tuple[Callable[..., Dual], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (
        lambda x: dual.linear(x, WEIGHT.to(x.value), BIAS.to(x.value)),
        lambda x: x @ WEIGHT.to(x).T + BIAS.to(x),
        ((3, 6),),
    ),
    "rms_norm": (
        lambda x: dual.rms_norm(x, eps=EPS),
        lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt(),
        ((3, 6),),
    ),
    "rms_norm with weight": (
        lambda x: dual.rms_norm(x, GAIN.to(x.value), eps=EPS),
        lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * GAIN.to(x),
        ((3, 6),),
    ),
    "layer_norm": (lambda x: dual.layer_norm(x, eps=EPS), written_out_layer_norm, ((3, 6),)),
    "add": (dual.add, torch.add, ((3, 6), (3, 6))),
    "modulate": (dual.modulate, lambda x, shift, scale: x * (1 + scale) + shift, ((3, 4, 6), (3, 1, 6), (3, 1, 6))),
    "gated_residual": (dual.gated_residual, lambda x, g, y: x + g * y, ((3, 4, 6), (3, 1, 6), (3, 4, 6))),
    "silu": (dual.silu, lambda x: x / (1 + torch.exp(-x)), ((3, 6),)),
    "gelu": (dual.gelu, tanh_gelu, ((3, 6),)),
    "attention": (lambda q, k, v: dual.attention(q, k, v, backend=None), softmax_attention, ((2, 3, 5, 4),) * 3),
    "sinusoids": (
        lambda t: dual.sinusoids(t.value, t.tangent, FREQUENCIES.to(t.value)),
        lambda t: torch.cat([torch.cos(t[:, None] * FREQUENCIES.to(t)), torch.sin(t[:, None] * FREQUENCIES.to(t))], -1),
        ((3,),),
    ),
}
CASES = [
    (name, present) for name, (_, _, shapes) in LAYERS.items() for present in product([True, False], repeat=len(shapes))
]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(z.shape, dtype=torch.float64, generator=draw).to(z.dtype) for z in outputs]
    total = sum(((z * d).sum() for z, d in zip(outputs, cotangents, strict=True)), torch.zeros(()))
    return list(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(("name", "present"), CASES)
def test_value_tangent_and_gradients_are_those_of_the_plain_formula(name: str, present: tuple[bool, ...]) -> None:
    layer, plain, shapes = LAYERS[name]
    draw = torch.Generator().manual_seed(4)

    def leaf(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw)

    primals64 = [leaf(shape) for shape in shapes]
    tangents64 = [leaf(shape) if exists else None for shape, exists in zip(shapes, present, strict=True)]

    def evaluate(way: Any, dtype: torch.dtype) -> list[Tensor]:
        primals = [z.to(dtype).requires_grad_() for z in primals64]
        tangents = [None if z is None else z.to(dtype).requires_grad_() for z in tangents64]
        outputs = way(primals, tangents)
        leaves = [*primals, *(z for z in tangents if z is not None)]
        return [*(z.detach() for z in outputs), *gradients(outputs, leaves)]

    def by_jvp(primals: list[Tensor], tangents: list[Tensor | None]) -> list[Tensor]:
        zeros = [torch.zeros_like(z) if z_t is None else z_t for z, z_t in zip(primals, tangents, strict=True)]
        value, tangent = torch.func.jvp(plain, tuple(primals), tuple(zeros))
        return [value, tangent] if any(present) else [value]

    def by_pair(primals: list[Tensor], tangents: list[Tensor | None]) -> list[Tensor]:
        result = layer(*map(Dual, primals, tangents))
        assert (result.tangent is None) == (not any(present))
        if result.tangent is None:
            return [result.value]
        assert result.tangent.shape == result.value.shape and result.tangent.dtype == result.value.dtype
        return [result.value, result.tangent]

    exact = evaluate(by_jvp, torch.float64)
    budget = network_budget(evaluate(by_jvp, torch.float32), exact, torch.float32, torch.float64)
    assert relative_error(evaluate(by_pair, torch.float64), exact) <= budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [dual.rms_norm, dual.layer_norm])
def test_norms_of_half_types_are_computed_and_returned_in_float32(norm: Any, dtype: torch.dtype) -> None:
    x, x_t = torch.randn(2, 4, 32).to(dtype)
    result = norm(Dual(x, x_t), eps=EPS)
    wide = norm(Dual(x.float(), x_t.float()), eps=EPS)
    assert torch.equal(result.value, wide.value) and torch.equal(result.tangent, wide.tangent)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(Dual(x, x_t), eps=EPS).tangent.dtype == torch.float32


def test_stock_layer_norm_would_give_a_wrong_gradient_of_the_jvp() -> None:
    """Why `dual` does not use F.layer_norm. When this fails, PyTorch has fixed it, and it may be used."""
    x, x_t = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    found = {}
    for name, norm in (("stock", lambda z: F.layer_norm(z, (6,), eps=EPS)), ("written out", written_out_layer_norm)):
        leaf = x.clone().requires_grad_()
        _, tangent = torch.func.jvp(norm, (leaf,), (x_t,))
        found[name] = [tangent.detach(), *torch.autograd.grad(tangent.pow(3).sum(), leaf)]
    assert relative_error(found["stock"][:1], found["written out"][:1]) < torch.finfo(torch.float32).eps
    assert relative_error(found["stock"][1:], found["written out"][1:]) > torch.finfo(torch.bfloat16).eps


def test_a_total_of_nothing_is_nothing() -> None:
    x = torch.ones(2)
    assert dual.total(None, None) is None
    assert dual.total(None, x) is x
    assert torch.equal(dual.total(x, None, x, x), torch.full((2,), 3.0))  # type: ignore[arg-type]
