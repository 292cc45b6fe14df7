"""Forward mode around compiled functions, in them, and where torch.compile leaves a part of them uncompiled: tangents
are right, are not there or are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import flashjvp

K, V = torch.randn(2, 2, 3, 16, 8)
Q, Q_T = torch.randn(2, 2, 3, 16, 8)


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch._dynamo.reset()  # how often a function may be compiled is limited


def _function(q: Tensor) -> Tensor:
    """Without the tangent of attention, the product would still have one, a wrong one."""
    return flashjvp.attention(q, K, V).sin() * q.sum()


def _broken(q: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return _function(q)


def _by_level(f: Callable[[Tensor], Tensor], q: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, Q_T))).tangent


def _by_func_jvp(f: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    tangent: Tensor = torch.func.jvp(f, (q,), (Q_T,))[1]
    return tangent


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [_function, _broken])
def test_a_level_around_a_compiled_function(
    function: Callable[[Tensor], Tensor], compiler: str, requires_grad: bool
) -> None:
    q = Q.clone().requires_grad_(requires_grad)
    expected = _by_level(_function, q)
    try:
        tangent = _by_level(torch.compile(function, backend=compiler), q)
    except NotImplementedError:  # ours, or that of PyTorch's own node of a compiled function
        return
    if tangent is not None:
        torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [_function, _broken])
@pytest.mark.parametrize("by", [_by_level, _by_func_jvp])
def test_a_level_in_a_compiled_function(
    by: Callable[..., Tensor | None], function: Callable[[Tensor], Tensor], compiler: str, requires_grad: bool
) -> None:
    q = Q.clone().requires_grad_(requires_grad)
    expected = by(_function, q)
    try:
        tangent = torch.compile(lambda q: by(function, q), backend=compiler)(q)
    except NotImplementedError:
        assert by is _by_level and function is _broken  # the rest of the function is compiled, the level around it
        return
    torch.testing.assert_close(tangent, expected)
