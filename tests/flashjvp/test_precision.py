"""precision="high": half types with float32 results, in every mode, and nearer to float64 where scores are large."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, UnsupportedError, attention, attention_jvp
from flashjvp.dispatch import schema
from flashjvp.operands import Operands, Options
from tests.flashjvp.forms import normal
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.oracles.attention import dense64, run

HALF = (torch.bfloat16, torch.float16)
LOCAL = pytest.mark.parametrize("backend", ["tiled", "reference"])


def tensors(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and their tangents."""
    return [normal(2, 3, rows, 8, seed=i).to(dtype) for i, rows in enumerate((9, 11, 11) * 2)]


@LOCAL
@pytest.mark.parametrize("dtype", HALF)
def test_results_are_float32_and_gradients_of_the_type_of_inputs(dtype: torch.dtype, backend: str) -> None:
    inputs = [x.requires_grad_() for x in tensors(dtype)]
    o, o_t = attention_jvp(*inputs, precision="high", backend=backend)
    assert o.dtype == o_t.dtype == torch.float32
    grads = torch.autograd.grad((o, o_t), inputs, (o.detach(), o_t.detach()))
    assert {grad.dtype for grad in grads} == {dtype}
    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact = attention_jvp(*wide, backend=backend)
    assert torch.equal(o, exact[0]) and torch.equal(o_t, exact[1])
    of_wide = torch.autograd.grad(exact, wide, (o.detach(), o_t.detach()))
    assert all(torch.equal(x, y.to(dtype)) for x, y in zip(grads, of_wide, strict=True))


@LOCAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_get_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    found, expected = (attention_jvp(*tensors(dtype), precision=x, backend=backend) for x in ("high", None))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("magnitude", [30.0, 100.0, 300.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_large_scores_in_bfloat16(magnitude: float, seed: int) -> None:
    """o and o_t are four times nearer, and gradients are off by the rounding of their type alone."""
    case = Case("scores", batch=(1,), m=200, n=200, d=64, dv=64, magnitude=magnitude)
    inputs = make_inputs(case, torch.bfloat16, seed=seed)
    exact, default, high = dense64(inputs), run(inputs, "tiled"), run(inputs, "tiled", precision="high")

    def error(results: Any, name: str) -> float:
        x, y = getattr(results, name).double(), getattr(exact, name)
        return float((x - y).norm() / y.norm())

    for name in ("o", "o_t"):
        assert error(high, name) < error(default, name) / 4
    for name in ("d_q", "d_k", "d_v", "d_q_t", "d_k_t", "d_v_t"):
        rounded = getattr(exact, name).bfloat16().double()
        assert error(high, name) < 1.05 * float((rounded - getattr(exact, name)).norm() / getattr(exact, name).norm())
    assert error(high, "d_q_t") < error(default, "d_q_t") / 2


def high(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention(q, k, v, precision="high", backend="tiled", **options)


def test_in_every_mode() -> None:
    inputs = tensors()
    primals, tangents = tuple(inputs[:3]), tuple(inputs[3:])
    o, o_t = attention_jvp(*inputs, precision="high", backend="tiled")
    in_modes: dict[str, Callable[[], Any]] = {
        "func.jvp": lambda: torch.func.jvp(high, primals, tangents),
        "compiled": lambda: torch.compile(
            lambda *x: attention_jvp(*x, precision="high", backend="tiled"), backend="aot_eager", fullgraph=True
        )(*inputs),
        "vmap": lambda: torch.vmap(lambda *x: attention_jvp(*x, precision="high", backend="tiled"))(*inputs),
        "again": lambda: [attention_jvp(*inputs, precision="high", backend="tiled") for _ in range(4)][-1],
    }
    for name, mode in in_modes.items():
        found = mode()
        assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(found, (o, o_t), strict=True)), name
    grad = torch.func.grad(lambda q: torch.func.jvp(lambda x: high(x, *primals[1:]), (q,), tangents[:1])[1].sum())
    assert grad(primals[0]).dtype == torch.bfloat16


@pytest.mark.parametrize("way", ["mask", "bias", "causal", "dropout", "grouped", "bmhd"])
def test_beside_other_options(way: str) -> None:
    """As float32 copies of the inputs give it."""
    q, k, v = tensors()[:3]
    options: dict[str, Any] = {
        "mask": {"attn_mask": normal(9, 11) > -0.5},
        "bias": {"attn_mask": normal(9, 11).bfloat16().requires_grad_()},
        "causal": {"is_causal": True},
        "dropout": {"dropout_p": 0.3},
        "grouped": {"enable_gqa": True},
        "bmhd": {"layout": "bmhd"},
    }[way]
    if way == "grouped":
        k, v = k[:, :1], v[:, :1]
    if way == "bmhd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(0)
    o = high(*given, **options)
    mask = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    wide_mask = [x.detach().float().requires_grad_() for x in mask]
    torch.manual_seed(0)
    expected = attention(*wide, backend="tiled", **(options | dict(zip(("attn_mask",), wide_mask, strict=False))))
    assert torch.equal(o, expected) and o.stride() == expected.stride()
    grads = torch.autograd.grad(o, [*given, *mask], torch.ones_like(o))
    of_wide = torch.autograd.grad(expected, [*wide, *wide_mask], torch.ones_like(o))
    assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(grads, of_wide, strict=True))
    assert {x.dtype for x in grads} == {torch.bfloat16}


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operators_keep_their_schemas(transposed: bool) -> None:
    """Types and strides of fake results are those of real ones."""
    x = [y.transpose(1, 2).contiguous().transpose(1, 2) if transposed else y for y in tensors()]
    operands = Operands(*[y.requires_grad_() for y in x])
    options = Options(False, None, "high:tiled")
    opcheck(schema.FORWARD.handle, (*operands.plain, *options))
    opcheck(schema.FORWARD_JVP.handle, (*operands, *options))


def test_in_models_that_nobody_rewrote() -> None:
    """Results have the type that PyTorch's own function gives, also under autocast; O and O_t are kept as they are."""
    q, k, v = (4 * x for x in tensors()[:3])
    expected = attention(q, k, v, precision="high").bfloat16()

    def gradient(jvp: Callable[[Tensor], Tensor]) -> Tensor:
        x = q.detach().requires_grad_()
        o_t = jvp(x)
        return torch.autograd.grad(o_t, x, torch.ones_like(o_t))[0]

    def of_model(x: Tensor) -> Tensor:
        return torch.func.jvp(F.scaled_dot_product_attention, (x, k, v), (q, k, v))[1]

    nearer = gradient(lambda x: attention_jvp(x, k, v, q, k, v, precision="high")[1])
    with flashjvp.replaced(precision="high"):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
        assert of_model(q).dtype == torch.bfloat16 and torch.equal(gradient(of_model), nearer)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(F.scaled_dot_product_attention(q.float(), k.float(), v.float()), expected)
    with flashjvp.replaced():
        assert not torch.equal(gradient(of_model), nearer)
    flashjvp.install(precision="high")
    try:
        assert torch.equal(gradient(of_model), nearer)
    finally:
        flashjvp.uninstall()


@pytest.mark.parametrize("function", [attention, attention_jvp, flashjvp.explain])
def test_what_it_refuses(function: Callable[..., Any]) -> None:
    q, k, v = tensors()[:3]
    with pytest.raises(ArgumentValueError, match="precision: expected None or 'high', got 'highest'"):
        function(q, k, v, precision="highest")
    with pytest.raises(ArgumentTypeError, match="precision: expected None or 'high', got an object of type int"):
        function(q, k, v, precision=16)
    with pytest.raises(UnsupportedError, match="precision: expected None beside a window, got 'high'"):
        function(q, k, v, precision="high", window=(2, 2))
    with pytest.raises(ArgumentValueError, match="backend: expected None or one of"):
        function(q, k, v, precision="high", backend="high:tiled")


def test_not_beside_a_block_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 11, device="cpu")
    with pytest.raises(UnsupportedError, match="precision: expected None beside a block mask, got 'high'"):
        attention(*tensors()[:3], mask, precision="high")


def test_what_replaced_refuses() -> None:
    with pytest.raises(ArgumentValueError, match="precision: expected None or 'high'"):
        flashjvp.replaced(precision="low")  # type: ignore[arg-type]
