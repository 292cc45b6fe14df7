"""A derivative beyond one JVP plus one backward raises: never a silent wrong or zero result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import flashjvp
from tests.flashjvp.dispatch.subjects import assert_same, dense, of_backend, tensors

X = tensors()
F = of_backend("tiled")


def of_queries(q: Tensor) -> Tensor:
    return F(q, X.k, X.v)


def loss(q: Tensor) -> Tensor:
    return of_queries(q).sin().sum()


def double_backward() -> Any:
    q = X.q.clone().requires_grad_()
    (d_q,) = torch.autograd.grad(loss(q), q, create_graph=True)
    return torch.autograd.grad(d_q.sum(), q)


def double_backward_of_a_jvp() -> Any:
    q = X.q.clone().requires_grad_()
    o, o_t = jvp(of_queries, (q,), (X.q_t,))
    (d_q,) = torch.autograd.grad(o.sum() + o_t.sum(), q, create_graph=True)
    return torch.autograd.grad(d_q.sum(), q)


def backward_inside_the_dual_level() -> Any:
    q = X.q.clone().requires_grad_()
    with forward_ad.dual_level():
        o, o_t = forward_ad.unpack_dual(of_queries(forward_ad.make_dual(q, X.q_t)))
        assert o_t is not None
        return torch.autograd.grad(o.sum() + o_t.sum(), q)


def explicit_with_dual_inputs() -> Any:
    return jvp(lambda q: flashjvp.attention_jvp(q, X.k, X.v, X.q_t, enable_gqa=True)[1], (X.q,), (X.q_t,))


def explicit_with_a_dual_tangent() -> Any:
    return jvp(lambda q_t: flashjvp.attention_jvp(X.q, X.k, X.v, q_t, enable_gqa=True)[1], (X.q_t,), (X.q_t,))


BEYOND: dict[str, Callable[[], Any]] = {
    "hessian": lambda: hessian(loss)(X.q),
    "grad of grad": lambda: grad(lambda q: grad(loss)(q).sum())(X.q),
    "jvp of grad": lambda: jvp(grad(loss), (X.q,), (X.q_t,)),
    "jvp of jvp": lambda: jvp(lambda q: jvp(of_queries, (q,), (X.q_t,))[1], (X.q,), (X.q_t,)),
    "jacfwd of jacfwd": lambda: jacfwd(jacfwd(of_queries))(X.q),
    "jacrev of jacrev": lambda: jacrev(jacrev(loss))(X.q),
    "double backward": double_backward,
    "double backward of a jvp": double_backward_of_a_jvp,
    "backward inside the dual level": backward_inside_the_dual_level,
    "attention_jvp of dual inputs": explicit_with_dual_inputs,
    "attention_jvp of a dual tangent": explicit_with_a_dual_tangent,
}


@pytest.mark.parametrize("name", BEYOND)
def test_beyond_first_order_raises(name: str) -> None:
    with pytest.raises(flashjvp.SecondOrderError, match="one JVP followed by one backward"):
        BEYOND[name]()


def test_attention_works_again_after_the_error() -> None:
    with pytest.raises(flashjvp.SecondOrderError):
        backward_inside_the_dual_level()
    assert_same(jvp(F, X.primals, X.tangents), jvp(dense, X.primals, X.tangents))


def test_attention_jvp_without_tangents_is_plain_attention_to_an_outer_jvp() -> None:
    """No derivative was taken yet, so a JVP around it is the first one; o_t is the constant zero."""

    def both(q: Tensor) -> tuple[Tensor, Tensor]:
        return flashjvp.attention_jvp(q, X.k, X.v, enable_gqa=True)

    (_, zero), (tangent, zero_tangent) = jvp(both, (X.q,), (X.q_t,))
    assert_same(tangent, jvp(lambda q: dense(q, X.k, X.v), (X.q,), (X.q_t,))[1])
    assert not zero.any() and not zero_tangent.any()
