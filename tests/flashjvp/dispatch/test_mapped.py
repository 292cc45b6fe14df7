"""Mapped and vectorised derivatives: every tensor that vmap expands or wraps reaches the kernels as what it is.

The triton backend runs in its interpreter, in float32; the others in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

import flashjvp
from verify.budget.tolerance import assert_within
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.oracles.attention import run

BACKENDS = ("reference", "tiled", pytest.param("triton", marks=pytest.mark.sampled(of=6)))  # the interpreter is slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")


def of(backend: str, mask: Tensor | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: flashjvp.attention(q, k, v, mask, enable_gqa=True, backend=backend)


def draw(backend: str) -> tuple[Tensor, ...]:
    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k, v = torch.randn(2, 4, 5, 4, dtype=dtype), *torch.randn(2, 2, 2, 7, 4, dtype=dtype)
    return q, k, v, torch.randn(3, 2, 4, 5, 4, dtype=dtype)


def masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {"none": None, "bool": torch.rand(2, 1, 5, 7) > 0.3, "additive": torch.randn(4, 5, 7, dtype=dtype)}


def equal(actual: Any, expected: Any) -> None:
    """Mapping changes neither tiles nor their order: the numbers are those of single calls, up to rounding."""
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mapped_pullback(backend: str, mask: str) -> None:
    q, k, v, d_o = draw(backend)
    pull = vjp(of(backend, masks(q.dtype)[mask]), q, k, v)[1]
    expected = [torch.stack(grads) for grads in zip(*map(pull, d_o), strict=True)]
    equal(list(vmap(pull)(d_o)), expected)
    equal(list(vmap(pull, in_dims=2)(d_o.movedim(0, 2))), expected)


@pytest.mark.parametrize("mask", ["none", "additive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mapped_pullback_of_a_jvp(backend: str, mask: str) -> None:
    q, k, v, d_o = draw(backend)
    f, v_t = of(backend, masks(q.dtype)[mask]), v.sin()
    pull = vjp(lambda q, k: jvp(lambda q, v: f(q, k, v), (q, v), (q.cos(), v_t)), q, k)[1]
    expected = [torch.stack(grads) for grads in zip(*(pull((x, x.cos())) for x in d_o), strict=True)]
    equal(list(vmap(lambda x: pull((x, x.cos())))(d_o)), expected)
    of_o_t = [torch.stack(grads) for grads in zip(*(pull((d_o[0], x)) for x in d_o), strict=True)]
    equal(list(vmap(lambda x: pull((d_o[0], x)))(d_o)), of_o_t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mapped_pullback_by_explicit_tangents(backend: str) -> None:
    q, k, v, d_o = draw(backend)

    def f(q: Tensor, v_t: Tensor) -> Any:
        return flashjvp.attention_jvp(q, k, v, None, k.cos(), v_t, enable_gqa=True, backend=backend)

    pull = vjp(f, q, v.sin())[1]
    expected = [torch.stack(grads) for grads in zip(*(pull((x, x.sin())) for x in d_o), strict=True)]
    equal(list(vmap(lambda x: pull((x, x.sin())))(d_o)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacobians_in_both_modes_agree(backend: str) -> None:
    q, k, v, _ = (x[:1, ..., :2, :2] for x in draw(backend))

    def f(q: Tensor) -> Tensor:
        return of(backend)(q, k, v)

    equal(jacrev(f)(q), jacfwd(f)(q))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vectorized_jacobians_of_torch_autograd(backend: str, strategy: str) -> None:
    q, k, v, _ = (x[:1, ..., :2, :2] for x in draw(backend))

    def f(q: Tensor, v: Tensor) -> Tensor:
        return of(backend)(q, k, v)

    jacobian = torch.autograd.functional.jacobian
    equal(jacobian(f, (q, v), vectorize=True, strategy=strategy), jacobian(f, (q, v)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_is_mapped_alone(backend: str) -> None:
    q, k, v, _ = draw(backend)
    for mask in (torch.rand(3, 5, 7) > 0.3, torch.randn(3, 5, 7, dtype=q.dtype)):
        expected = torch.stack([of(backend, one)(q, k, v) for one in mask])
        equal(vmap(lambda one: of(backend, one)(q, k, v))(mask), expected)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_gradcheck_with_batched_gradients_in_both_modes(backend: str) -> None:
    x = [y[:1, ..., :2].clone().requires_grad_() for y in draw(backend)[:3]]
    assert torch.autograd.gradcheck(
        of(backend), x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


def test_expanded_cotangents_and_tangents_reach_the_kernels_whole() -> None:
    inputs = make_inputs(Case("expanded", (2,), 2, 2, m=20, n=24, d=8, dv=8), torch.float32)
    assert inputs.d_o is not None and inputs.q_t is not None and inputs.v_t is not None
    inputs = replace(
        inputs,
        d_o=inputs.d_o[:1, :1, :1].expand_as(inputs.d_o),
        q_t=inputs.q_t[:, :1, :1, :1].expand_as(inputs.q_t),
        v_t=inputs.v_t[:1].expand_as(inputs.v_t),
    )
    assert_within(inputs, run(inputs, "triton"))
