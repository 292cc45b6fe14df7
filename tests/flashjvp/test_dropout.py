"""Dropout: one mask for the forward pass, its tangent and the backward pass, the same on every backend."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError
from flashjvp.backends import philox
from tests.flashjvp.forms import normal

B, H, M, N, D = 2, 4, 5, 37, 8
BACKENDS = ["reference", "tiled", "triton"]


def inputs(dtype: torch.dtype = torch.float64, heads: int = H) -> list[Tensor]:
    return [normal(B, h, rows, D, dtype=dtype) for h, rows in ((H, M), (heads, N), (heads, N))]


def seeded(function: Callable[..., Tensor], seed: int) -> Callable[..., Tensor]:
    """The function after torch.manual_seed."""

    def run(*xs: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return function(*xs)

    return run


def served(backend: str | None, p: float, seed: int = 7, **options: object) -> Callable[..., Tensor]:
    return seeded(
        lambda q, k, v, *mask: flashjvp.attention(
            q, k, v, *mask, dropout_p=p, enable_gqa=True, backend=backend, **options
        ),
        seed,
    )


def kept(p: float, seed: int = 7, shape: tuple[int, ...] = (B, H, M, N)) -> Tensor:
    """The mask of a call after torch.manual_seed(seed): what values of one-hot rows show."""
    torch.manual_seed(seed)
    q, k = torch.zeros(*shape[:-1], 1), torch.zeros(*shape[:-2], shape[-1], 1)
    v = torch.eye(shape[-1]).expand(*shape[:-2], -1, -1)
    return flashjvp.attention(q, k, v, dropout_p=p, backend="reference") > 0


def dense(p: float, causal: bool = False) -> Callable[..., Tensor]:
    Z = kept(p)

    def attention(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        S = q @ k.mT * q.shape[-1] ** -0.5
        for bias in mask:
            S = S + bias
        if causal:
            S = S.masked_fill(torch.ones(S.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return (S.softmax(-1) * Z / (1 - p)) @ v

    return attention


def through_both(function: Callable[..., Tensor], xs: list[Tensor]) -> list[Tensor]:
    xs = [x.detach().requires_grad_() for x in xs]
    tangents = [torch.sin(3 * x.detach()).requires_grad_() for x in xs]
    o, o_t = torch.func.jvp(function, tuple(xs), tuple(tangents))
    return [o, o_t, *torch.autograd.grad((o.sin() + o_t * o.cos() + o_t).sum(), (*xs, *tangents))]


def bar(backend: str) -> dict[str, float]:
    return {"rtol": 2e-4, "atol": 5e-5} if backend == "triton" else {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.pairwise
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [H, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_all_derivatives_are_those_of_dense_attention_with_that_mask(
    backend: str, biased: bool, heads: int, causal: bool
) -> None:
    xs = inputs(torch.float32 if backend == "triton" else torch.float64, heads)
    xs += [normal(H, 1, N, dtype=xs[0].dtype)] * biased
    found = through_both(served(backend, 0.3, is_causal=causal), xs)
    expected = through_both(dense(0.3, causal), [x.double() for x in xs])
    for one, other in zip(found, expected, strict=True):
        assert_close(one.double(), other, **bar(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_mode_alone(backend: str) -> None:
    xs = [x.requires_grad_() for x in inputs(torch.float32 if backend == "triton" else torch.float64)]
    wide = [x.detach().double().requires_grad_() for x in xs]
    found = torch.autograd.grad(served(backend, 0.5)(*xs).sin().sum(), xs)
    expected = torch.autograd.grad(dense(0.5)(*wide).sin().sum(), wide)
    for one, other in zip(found, expected, strict=True):
        assert_close(one.double(), other, **bar(backend))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_finite_differences_with_a_fixed_seed(backend: str) -> None:
    xs = tuple(normal(1, 2, rows, 3, seed=rows).requires_grad_() for rows in (2, 4, 4))
    assert torch.autograd.gradcheck(served(backend, 0.4), xs, check_forward_ad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_decides(backend: str) -> None:
    xs = inputs(torch.float32)
    first, again, other = (served(backend, 0.4, seed)(*xs) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    calls = [flashjvp.attention(*xs, dropout_p=0.4, backend=backend) for _ in range(2)]
    assert torch.equal(calls[0], first) and not torch.equal(calls[1], first)


def test_explicit_tangents_draw_as_func_jvp_does() -> None:
    xs = inputs()
    tangents = [x.sin() for x in xs]
    torch.manual_seed(3)
    found = flashjvp.attention_jvp(*xs, *tangents, dropout_p=0.4)
    expected = torch.func.jvp(served(None, 0.4, 3), tuple(xs), tuple(tangents))
    assert_close(found, expected)


def test_no_dropout_draws_nothing() -> None:
    xs = inputs()
    state = torch.get_rng_state()
    for p in (0.0, 0, torch.tensor(0.0)):
        assert torch.equal(flashjvp.attention(*xs, dropout_p=p), flashjvp.attention(*xs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_dropped_is_what_pytorch_gives(backend: str) -> None:
    xs = [x.requires_grad_() for x in inputs(torch.float32)]
    o = flashjvp.attention(*xs, dropout_p=1.0, backend=backend)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(*xs, dropout_p=1.0)
    assert torch.equal(o, expected) and not o.any()
    assert not any(grad.any() for grad in torch.autograd.grad(o.sum(), xs))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_the_one_asked_for(p: float) -> None:
    Z = kept(p, shape=(4, 4, 64, 256)).double()
    total = Z.numel()
    assert abs(Z.mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / total)
    for dim in range(4):  # of every batch entry, head, query and key
        rates = Z.mean([d for d in range(4) if d != dim])
        assert (rates - (1 - p)).abs().max() < 5.5 * math.sqrt(p * (1 - p) * Z.shape[dim] / total)


def test_rows_heads_entries_and_calls_are_independent() -> None:
    Z = kept(0.5, shape=(3, 3, 48, 256)).double() * 2 - 1
    other = kept(0.5, seed=8, shape=(3, 3, 48, 256)).double() * 2 - 1
    bound = 5.5 / math.sqrt(Z.numel())
    for dim in range(4):
        for shift in (1, 2):
            near, far = Z.narrow(dim, 0, Z.shape[dim] - shift), Z.narrow(dim, shift, Z.shape[dim] - shift)
            assert abs((near * far).mean().item()) < bound * math.sqrt(Z.shape[dim] / (Z.shape[dim] - shift))
    assert abs((Z * other).mean().item()) < bound


def test_philox_is_the_published_generator() -> None:
    """Known answers of Philox 4x32-10 (Random123): counter and key of zeros, and of ones."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert philox.philox(zero, zero, zero, zero, zero).item() == 0x6627E8D5
    assert philox.philox(torch.tensor(-1), ones, ones, ones, ones).item() == 0x408F276D


def test_vmap_asks_for_randomness() -> None:
    q, k, v = (torch.stack([x, x]) for x in inputs())
    call = lambda q, k, v: flashjvp.attention(q, k, v, dropout_p=0.5)  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(q, k, v)
    same = torch.func.vmap(call, randomness="same")(q, k, v)
    different = torch.func.vmap(call, randomness="different")(q, k, v)
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    _, o_t = torch.func.vmap(lambda *x: torch.func.jvp(call, x, tuple(y.sin() for y in x)), randomness="different")(
        q, k, v
    )
    assert not torch.equal(o_t[0], o_t[1])


def test_checkpoint_recomputes_with_the_same_mask() -> None:
    xs = [x.requires_grad_() for x in inputs()]
    call = lambda *x: flashjvp.attention(*x, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(5)
    plain = torch.autograd.grad(call(*xs).sin().sum(), xs)
    torch.manual_seed(5)
    assert_close(torch.autograd.grad(checkpoint(call, *xs, use_reentrant=False).sin().sum(), xs), plain)


def test_compiled() -> None:
    xs = [x.requires_grad_() for x in inputs()]

    def loss(*x: Tensor) -> Tensor:
        o, o_t = torch.func.jvp(lambda *y: flashjvp.attention(*y, dropout_p=0.5), x, tuple(y.sin() for y in x))
        return (o * o_t).sum()

    torch.manual_seed(4)
    expected = torch.autograd.grad(loss(*xs), xs)
    torch.manual_seed(4)
    assert_close(torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*xs), xs), expected)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_no_probability(p: float) -> None:
    for call in (flashjvp.attention, flashjvp.attention_jvp):
        with pytest.raises(ArgumentValueError, match="dropout_p: expected a probability"):
            call(*inputs(), dropout_p=p)
        with pytest.raises(ArgumentTypeError, match="dropout_p: expected a real number"):
            call(*inputs(), dropout_p="half")


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("d", [40, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_the_kernels_drop_what_the_reference_drops(dtype: torch.dtype, d: int, biased: bool) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(2, 3, rows, d, device="cuda", dtype=dtype) for rows in (130, 150, 150)]
    xs += [torch.randn(3, 1, 150, device="cuda", dtype=dtype)] * biased
    found = through_both(served("triton", 0.3), xs)
    expected = through_both(served("reference", 0.3), [x.double() for x in xs])
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 8 * torch.finfo(dtype).eps * other.norm()
