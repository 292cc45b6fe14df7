"""Additive masks have gradients and tangents: learned biases of every broadcast shape, under every transform."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, SecondOrderError
from tests.flashjvp.forms import normal

B, H, M, N, D, DV = 2, 4, 5, 7, 8, 3
SHAPES = [(M, N), (H, M, N), (B, 1, M, N), (B, H, M, N), (H, 1, N), (B, 1, 1, N), (H, M, 1), (1,)]
BACKENDS = ["reference", "tiled", "triton"]
NAMES = ("q", "k", "v", "mask")


def inputs(shape: tuple[int, ...], heads: int = H, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and a bias."""
    shapes = ((B, H, M, D), (B, heads, N, D), (B, heads, N, DV), shape)
    return [normal(*x, dtype=dtype) for x in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool = False) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    S = q @ k.mT * q.shape[-1] ** -0.5 + bias
    if causal:
        S = S.masked_fill(torch.ones(S.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return S.softmax(-1) @ v


def served(backend: str | None, causal: bool = False) -> Callable[..., Tensor]:
    return lambda q, k, v, bias: flashjvp.attention(q, k, v, bias, 0.0, causal, enable_gqa=True, backend=backend)


def through_both(function: Callable[..., Tensor], xs: list[Tensor], among: tuple[int, ...]) -> list[Tensor]:
    """o, o_t along tangents of the inputs `among`, and the gradients of all inputs and tangents through both."""
    xs = [x.detach().requires_grad_() for x in xs]
    tangents = [torch.sin(3 * xs[i].detach()).requires_grad_() for i in among]

    def of_some(*some: Tensor) -> Tensor:
        given = list(xs)
        for i, x in zip(among, some, strict=True):
            given[i] = x
        return function(*given)

    o, o_t = torch.func.jvp(of_some, tuple(xs[i] for i in among), tuple(tangents))
    grads = torch.autograd.grad((o.sin() + o_t * o.cos() + o_t).sum(), (*xs, *tangents), allow_unused=True)
    return [o, o_t, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, (*xs, *tangents), strict=True))]


def tolerance(backend: str) -> dict[str, float]:
    return {"rtol": 2e-4, "atol": 2e-5} if backend == "triton" else {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.pairwise
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [H, 2, 1])
@pytest.mark.parametrize(
    "among", [c for n in (1, 2, 4) for c in itertools.combinations(range(4), n) if n < 2 or 3 in c]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_all_derivatives_are_those_of_dense_attention(
    backend: str, shape: tuple[int, ...], among: tuple[int, ...], heads: int, causal: bool
) -> None:
    xs = inputs(shape, heads, torch.float32 if backend == "triton" else torch.float64)
    found = through_both(served(backend, causal), xs, among)
    expected = through_both(lambda *x: dense(*x, causal=causal), [x.double() for x in xs], among)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert_close(one.double(), other, **tolerance(backend))


@pytest.mark.sampled(of=3)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_mode_alone_and_of_the_mask_alone(backend: str, shape: tuple[int, ...]) -> None:
    xs = [x.requires_grad_() for x in inputs(shape, dtype=torch.float32 if backend == "triton" else torch.float64)]
    wide = [x.detach().double().requires_grad_() for x in xs]
    expected = torch.autograd.grad(dense(*wide).sin().sum(), wide)
    found = torch.autograd.grad(served(backend)(*xs).sin().sum(), xs)
    q, k, v, bias = xs
    (alone,) = torch.autograd.grad(served(backend)(q.detach(), k.detach(), v.detach(), bias).sin().sum(), bias)
    for one, other in zip((*found, alone), (*expected, expected[-1]), strict=True):
        assert_close(one.double(), other, **tolerance(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_explicit_tangents_are_those_of_func_jvp(backend: str) -> None:
    xs = inputs((H, 1, N), dtype=torch.float32)
    tangents = [torch.sin(x) for x in xs]
    o, o_t = flashjvp.attention_jvp(*xs[:3], *tangents[:3], xs[3], attn_mask_t=tangents[3], backend=backend)
    expected = torch.func.jvp(served(backend), tuple(xs), tuple(tangents))
    assert_close((o, o_t), expected)
    alone = flashjvp.attention_jvp(*xs[:3], attn_mask=xs[3], attn_mask_t=tangents[3], backend=backend)
    assert_close(alone, torch.func.jvp(lambda bias: served(backend)(*xs[:3], bias), (xs[3],), (tangents[3],)))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_transforms(backend: str) -> None:
    xs = inputs((H, M, N))
    f, q, k, v, bias = served(backend), *xs
    of_bias = lambda g: lambda bias: g(q, k, v, bias)  # noqa: E731
    for transform in (torch.func.jacrev, torch.func.jacfwd, lambda g: torch.func.grad(lambda x: g(x).sin().sum())):
        assert_close(transform(of_bias(f))(bias), transform(of_bias(dense))(bias))
    many = torch.stack([bias, bias.sin(), bias.cos()])
    for transform in (
        lambda g: torch.func.vmap(of_bias(g)),
        lambda g: torch.func.vmap(torch.func.grad(lambda x: of_bias(g)(x).sin().sum())),
        lambda g: torch.func.vmap(lambda x: torch.func.jvp(of_bias(g), (x,), (x.sin(),))[1]),
    ):
        assert_close(transform(f)(many), transform(dense)(many))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(bias, bias.sin())
        o, o_t = forward_ad.unpack_dual(f(q, k, v, dual))
    assert_close((o, o_t), torch.func.jvp(of_bias(dense), (bias,), (bias.sin(),)))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradcheck(backend: str) -> None:
    xs = tuple(x.requires_grad_() for x in inputs((H, 1, N)))
    check = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(served(backend), xs, **check)


def test_a_mapped_mask_of_unmapped_inputs_and_the_other_way_round() -> None:
    q, k, v, bias = inputs((M, N))
    qs, biases = torch.stack([q, q.sin()]), torch.stack([bias, bias.cos()])
    for in_dims, given in (((0, None, None, None), (qs, k, v, bias)), ((None, None, None, 0), (q, k, v, biases))):
        grads = [torch.func.grad(lambda *x, g=g: g(*x).sin().sum(), argnums=(0, 3)) for g in (served("tiled"), dense)]
        found, expected = (torch.func.vmap(grad, in_dims)(*given) for grad in grads)
        assert_close(found, expected)


def test_compiled_and_checkpointed() -> None:
    xs = [x.requires_grad_() for x in inputs((H, M, N))]

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        o, o_t = torch.func.jvp(lambda b: served("tiled")(q, k, v, b), (bias,), (bias.sin(),))
        return (o * o_t).sum()

    expected = torch.autograd.grad(loss(*xs), xs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(torch.autograd.grad(compiled(*xs), xs), expected)
    o = checkpoint(lambda *x: served("tiled")(*x), *xs, use_reentrant=False)
    wide = [x.detach().requires_grad_() for x in xs]
    assert_close(torch.autograd.grad(o.sin().sum(), xs), torch.autograd.grad(dense(*wide).sin().sum(), wide))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_query_may_see_has_no_gradient(backend: str) -> None:
    q, k, v, bias = inputs((M, N), dtype=torch.float32)
    bias[0] = -torch.inf  # a query that sees nothing
    bias[:, 2] = -torch.inf
    xs = [x.requires_grad_() for x in (q, k, v, bias)]
    o, o_t = torch.func.jvp(served(backend), tuple(xs), tuple(torch.zeros_like(x).cos() for x in xs))
    assert o.isfinite().all() and o_t.isfinite().all() and not o[:, :, 0].any()
    *grads, d_bias = torch.autograd.grad((o + o_t * o).sum(), xs)
    assert all(grad.isfinite().all() for grad in grads)
    assert not d_bias[0].any() and not d_bias[:, 2].any() and d_bias[1:, 3:].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_bias_of_half_inputs_has_float32_gradients(backend: str) -> None:
    *qkv, bias = inputs((1, M, N), dtype=torch.float32)
    q, k, v = (x.half() for x in qkv)
    bias.requires_grad_()
    (found,) = torch.autograd.grad(served(backend)(q, k, v, bias).float().sin().sum(), bias)
    wide = bias.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(dense(q.double(), k.double(), v.double(), wide).sin().sum(), wide)
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, rtol=0, atol=4e-3 * expected.abs().max().item())


def test_a_gradient_has_the_shape_of_the_mask_and_no_more_memory() -> None:
    """The mask [H, 1, N] of 2048 queries: nothing of M x N numbers is allocated."""
    q, k, v = (torch.randn(1, 2, 2048, 8).requires_grad_() for _ in range(3))
    bias = torch.randn(2, 1, 2048).requires_grad_()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            return out

    o = flashjvp.attention(q, k, v, bias, backend="tiled")
    with Watch():
        (grad,) = torch.autograd.grad(o.sum(), bias)
    assert grad.shape == bias.shape and max(sizes) < 2 * 2048 * 2048


def test_derivatives_of_the_second_order_are_refused() -> None:
    q, k, v, bias = inputs((M, N))
    bias.requires_grad_()
    (grad,) = torch.autograd.grad(served(None)(q, k, v, bias).sin().sum(), bias, create_graph=True)
    with pytest.raises(SecondOrderError):
        grad.sum().backward()
    with pytest.raises(SecondOrderError):
        torch.func.jvp(
            lambda b: torch.func.jvp(lambda c: served(None)(q, k, v, c), (b,), (b.sin(),))[1], (bias,), (bias.cos(),)
        )


def test_bad_tangents_of_masks() -> None:
    q, k, v, bias = inputs((M, N))
    with pytest.raises(ArgumentTypeError, match="attn_mask_t: expected"):
        flashjvp.attention_jvp(q, k, v, attn_mask=bias, attn_mask_t=bias.float())
    with pytest.raises(ArgumentValueError, match="attn_mask_t: expected"):
        flashjvp.attention_jvp(q, k, v, attn_mask=bias, attn_mask_t=bias[0])
    with pytest.raises(ArgumentValueError, match="attn_mask_t: expected"):
        flashjvp.attention_jvp(q, k, v, attn_mask=bias > 0, attn_mask_t=bias)
    with pytest.raises(ArgumentValueError, match="attn_mask_t: expected"):
        flashjvp.attention_jvp(q, k, v, attn_mask_t=bias)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [40, 64, 128])
@pytest.mark.parametrize("shape", [(1, 3, 1, 150), (3, 130, 150), (2, 1, 130, 150), (130, 150)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...], d: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, 3, 130, d), (2, 3, 150, d), (2, 3, 150, d), shape)
    xs = [torch.randn(x, device="cuda", dtype=dtype) for x in shapes]
    found = through_both(served("triton"), xs, (0, 1, 2, 3))
    expected = through_both(dense, [x.double() for x in xs], (0, 1, 2, 3))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() < 8 * torch.finfo(dtype).eps * other.norm()
