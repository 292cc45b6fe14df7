"""Every composition of transforms that attention takes part in, against PyTorch's own derivatives of dense
attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import flashjvp
from tests.flashjvp.dispatch.subjects import Attention, assert_same, dense, launches, of_backend, tensors

BACKENDS = ("reference", "tiled")
X = tensors()


def plain(f: Attention) -> Any:
    return f(*X.primals)


def backward(f: Attention) -> Any:
    leaves = X.leaves().primals
    return torch.autograd.grad(f(*leaves).sin().sum(), leaves)


def jvp_all(f: Attention) -> Any:
    return jvp(f, X.primals, X.tangents)


def jvp_of_queries(f: Attention) -> Any:
    return jvp(lambda q: f(q, X.k, X.v), (X.q,), (X.q_t,))


def jvp_of_values(f: Attention) -> Any:
    return jvp(lambda v: f(X.q, X.k, v), (X.v,), (X.v_t,))


def jvp_with_zero_tangents(f: Attention) -> Any:
    zero = torch.zeros_like(X.q)
    return jvp(f, X.primals, (zero, X.k_t, torch._efficientzerotensor(X.v.shape, dtype=X.v.dtype)))


def jvp_with_strided_tangents(f: Attention) -> Any:
    q_t = X.q_t.transpose(1, 2).contiguous().transpose(1, 2)
    v_t = X.v_t[..., :1].expand_as(X.v)
    return jvp(f, X.primals, (q_t, X.k_t.flip(-1).flip(-1), v_t))


def reverse_over_forward(f: Attention) -> Any:
    leaves = X.leaves()
    o, o_t = jvp(f, leaves.primals, leaves.tangents)
    return torch.autograd.grad(o.sin().sum() + o_t.cos().sum(), leaves)


def gradient_of_o_alone(f: Attention) -> Any:
    leaves = X.leaves()
    o, _ = jvp(f, leaves.primals, leaves.tangents)
    return torch.autograd.grad(o.sin().sum(), leaves.primals)


def gradient_of_o_t_alone(f: Attention) -> Any:
    leaves = X.leaves()
    _, o_t = jvp(f, leaves.primals, leaves.tangents)
    return torch.autograd.grad(o_t.sin().sum(), leaves)


def parameters_upstream(f: Attention) -> Any:
    """The weights before attention get their gradient through o and through the tangent."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6, dtype=torch.float64)
    weights = tuple(layer.parameters())
    o, o_t = jvp(lambda x: f(layer(x), X.k, X.v), (X.q,), (X.q_t,))
    return torch.autograd.grad(o.sin().sum() + o_t.cos().sum(), weights)


def functional_parameters(f: Attention) -> Any:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6, dtype=torch.float64)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        _, o_t = jvp(lambda x: f(functional_call(layer, weights, (x,)), X.k, X.v), (X.q,), (X.q_t,))
        return o_t.sin().sum()

    return grad(loss)({name: weight.detach() for name, weight in layer.named_parameters()})


def grad_over_jvp(f: Attention) -> Any:
    def loss(q: Tensor, q_t: Tensor) -> Tensor:
        return jvp(lambda q: f(q, X.k, X.v), (q,), (q_t,))[1].sin().sum()

    return grad(loss, argnums=(0, 1))(X.q, X.q_t)


def grad_and_value_over_jvp(f: Attention) -> Any:
    return grad_and_value(lambda q: jvp(lambda q: f(q, X.k, X.v), (q,), (X.q_t,))[1].sin().sum())(X.q)


def vmap_all(f: Attention) -> Any:
    return vmap(f)(*X.primals)


def vmap_some(f: Attention) -> Any:
    return vmap(f, in_dims=(0, None, 1))(X.q, X.k[0], X.v.transpose(0, 1))


def vmap_twice(f: Attention) -> Any:
    return vmap(vmap(f, in_dims=(0, None, None)), in_dims=(None, 0, 0))(X.q, X.k, X.v)


def vmap_over_jvp(f: Attention) -> Any:
    return vmap(lambda q, q_t: jvp(lambda q: f(q, X.k[0], X.v[0]), (q,), (q_t,)))(X.q, X.q_t)


def vmap_over_tangents(f: Attention) -> Any:
    many = torch.stack((X.q_t, 2 * X.q_t, X.q_t.sin()))
    return vmap(lambda q_t: jvp(lambda q: f(q, X.k, X.v), (X.q,), (q_t,))[1])(many)


def jvp_over_vmap(f: Attention) -> Any:
    return jvp(vmap(f), X.primals, X.tangents)


def vmap_over_grad(f: Attention) -> Any:
    return vmap(grad(lambda q, k, v: f(q, k, v).sin().sum(), argnums=(0, 1, 2)))(*X.primals)


def vmap_over_grad_over_jvp(f: Attention) -> Any:
    def loss(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor) -> Tensor:
        return jvp(lambda q: f(q, k, v), (q,), (q_t,))[1].sin().sum()

    return vmap(grad(loss, argnums=(0, 1, 2, 3)))(*X.primals, X.q_t)


def linearized(f: Attention) -> Any:
    o, tangent_map = linearize(f, *X.primals)
    return o, tangent_map(*X.tangents)


def jacobian_forward(f: Attention) -> Any:
    return jacfwd(f, argnums=(0, 1, 2))(*X.primals)


def jacobian_reverse(f: Attention) -> Any:
    return jacrev(f, argnums=(0, 1, 2))(*X.primals)


def jacobian_reverse_of_jvp(f: Attention) -> Any:
    return jacrev(lambda q: jvp(lambda q: f(q, X.k, X.v), (q,), (X.q_t,))[1])(X.q)


def vector_jacobian(f: Attention) -> Any:
    o, pull = vjp(f, *X.primals)
    return o, pull(o.cos())


def checkpointed_jvp(f: Attention) -> Any:
    leaves = X.leaves()

    def block(*xs: Tensor) -> Any:
        return jvp(f, xs[:3], xs[3:])

    o, o_t = checkpoint(block, *leaves, use_reentrant=False)
    return torch.autograd.grad(o.sin().sum() + o_t.cos().sum(), leaves)


CASES: list[Callable[[Attention], Any]] = [
    plain, backward, jvp_all, jvp_of_queries, jvp_of_values, jvp_with_zero_tangents, jvp_with_strided_tangents,
    reverse_over_forward, gradient_of_o_alone, gradient_of_o_t_alone, parameters_upstream, functional_parameters,
    grad_over_jvp, grad_and_value_over_jvp, vmap_all, vmap_some, vmap_twice, vmap_over_jvp, vmap_over_tangents,
    jvp_over_vmap, vmap_over_grad, vmap_over_grad_over_jvp, linearized, jacobian_forward, jacobian_reverse,
    jacobian_reverse_of_jvp, vector_jacobian, checkpointed_jvp,
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_composition(case: Callable[[Attention], Any], backend: str) -> None:
    assert_same(case(of_backend(backend)), case(dense))


def dual(f: Attention, *xs: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        pairs = (forward_ad.make_dual(x, x_t) for x, x_t in zip(xs[:3], xs[3:], strict=True))
        o, o_t = forward_ad.unpack_dual(f(*pairs))
    assert o_t is not None
    return o, o_t


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_ad_with_the_backward_after_it(backend: str) -> None:
    """Dense attention under dual_level cannot be differentiated in reverse (PyTorch's softmax rule), so func.jvp is the
    oracle."""
    leaves = X.leaves()
    o, o_t = dual(of_backend(backend), *leaves)
    assert_same((o, o_t), jvp(dense, X.primals, X.tangents))
    actual = torch.autograd.grad(o.sin().sum() + o_t.cos().sum(), leaves)
    assert_same(actual, reverse_over_forward(dense))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["func.jvp", "dual_level", "explicit"])
def test_one_forward_and_one_backward_launch(level: str, backend: str) -> None:
    leaves, f = X.leaves(), of_backend(backend)
    with launches() as names:
        if level == "func.jvp":
            o, o_t = jvp(f, leaves.primals, leaves.tangents)
        elif level == "dual_level":
            o, o_t = dual(f, *leaves)
        else:
            o, o_t = flashjvp.attention_jvp(*leaves, enable_gqa=True, backend=backend)
        assert names == ["forward_jvp"]
        torch.autograd.grad(o.sum() + o_t.sum(), leaves)
    assert names == ["forward_jvp", "backward_jvp"]


def test_plain_calls_never_launch_the_jvp() -> None:
    leaves = X.leaves().primals
    with launches() as names:
        torch.autograd.grad(of_backend("tiled")(*leaves).sum(), leaves)
    assert names == ["forward", "backward"]


def test_unwanted_gradients_are_not_asked_for() -> None:
    q = X.q.clone().requires_grad_()
    o, o_t = jvp(lambda q: of_backend("tiled")(q, X.k, X.v), (q,), (X.q_t,))
    assert_same(torch.autograd.grad(o.sum() + o_t.sum(), q), grad_of_queries(dense))


def grad_of_queries(f: Attention) -> Any:
    q = X.q.clone().requires_grad_()
    o, o_t = jvp(lambda q: f(q, X.k, X.v), (q,), (X.q_t,))
    return torch.autograd.grad(o.sum() + o_t.sum(), q)


def test_no_graph_is_kept_under_no_grad() -> None:
    leaves, f = X.leaves(), of_backend("tiled")
    with torch.no_grad():
        o, o_t = jvp(f, leaves.primals, leaves.tangents)
        explicit = flashjvp.attention_jvp(*leaves, enable_gqa=True, backend="tiled")
        outputs = (f(*leaves.primals), o, o_t, *explicit)
    assert not any(x.requires_grad for x in outputs)
    assert not any(x.requires_grad for x in jvp(f, X.primals, X.tangents))


def test_inference_mode() -> None:
    """As every function of PyTorch: up to torch 2.12 the tangents there are zeros."""
    with torch.inference_mode():
        assert of_backend("tiled")(*X.primals).is_inference()
        actual, expected = (jvp(f, X.primals, X.tangents) for f in (of_backend("tiled"), dense))
        assert_same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    """Under autocast everything runs in its type, tangents included, and gradients come back in the type of the
    leaves."""
    single = tuple(x.float().requires_grad_() for x in X)
    low = tuple(x.detach().bfloat16().requires_grad_() for x in single)
    with torch.autocast("cpu", torch.bfloat16):
        o, o_t = jvp(of_backend(backend), single[:3], single[3:])
    expected = jvp(of_backend(backend), low[:3], low[3:])
    assert o.dtype == o_t.dtype == torch.bfloat16
    assert torch.equal(o, expected[0]) and torch.equal(o_t, expected[1])
    actual = torch.autograd.grad(o.sum() + o_t.sum(), single)
    wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), low)
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_pytorchs_layer_norm_has_a_wrong_gradient_through_its_jvp() -> None:
    """Why docs/training.md warns of it: when this fails, PyTorch has been mended and the warning can go."""

    def written_out(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)

    def through_jvp(norm: Callable[[Tensor], Tensor]) -> Tensor:
        x = X.q.clone().requires_grad_()
        return torch.autograd.grad(jvp(norm, (x,), (X.q_t,))[1].sin().sum(), x)[0]

    stock = through_jvp(lambda x: F.layer_norm(x, x.shape[-1:]))
    assert not torch.allclose(stock, through_jvp(written_out))
    rms = through_jvp(lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6))
    assert_same(rms, through_jvp(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))
