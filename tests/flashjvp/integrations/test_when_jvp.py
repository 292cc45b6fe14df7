"""`flashjvp.replaced(when="jvp")`: calls without a tangent are PyTorch's own, in every kind of level."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import flashjvp
from tests.flashjvp.integrations.calls import FUNCTIONS, Q, call


def test_pytorch_serves_calls_without_a_tangent() -> None:
    fast = torch.backends.mha.get_fastpath_enabled
    with flashjvp.replaced(when="jvp") as replaced:
        assert torch.equal(call(), FUNCTIONS[0](Q, Q, Q))
        assert fast() == torch.backends.mha.get_fastpath_enabled()
        _, o_t = torch.func.jvp(F.scaled_dot_product_attention, (Q, Q, Q), (Q, Q, Q))
        torch.func.jvp(lambda x: (call(), torch.backends.mha.get_fastpath_enabled())[0] + x, (Q,), (Q,))
    rows = {(row.served_by, row.calls) for row in replaced.report().rows}
    assert rows == {("PyTorch", 2), ("flashjvp", 1)}
    _, expected = flashjvp.attention_jvp(Q, Q, Q, Q, Q, Q)
    assert torch.equal(o_t, expected)


def dual_level(f: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(Q, Q))).tangent
    assert tangent is not None
    return tangent


def of_func_jvp(f: Callable[[Tensor], Tensor]) -> Tensor:
    tangent: Tensor = torch.func.jvp(f, (Q,), (Q,))[1]
    return tangent


WAYS = {
    "a dual level": dual_level,
    "func.jvp": of_func_jvp,
    "a dual level in vmap": lambda f: torch.vmap(lambda _: dual_level(f))(torch.ones(1))[0],
    "func.jvp of vmap": lambda f: of_func_jvp(torch.vmap(f)),
    "vmap of func.jvp": lambda f: torch.vmap(lambda x: torch.func.jvp(f, (x,), (x,))[1])(Q),
    "func.jvp in grad": lambda f: torch.func.grad(lambda s: (s * of_func_jvp(f).sin()).sum())(
        torch.ones_like(Q[0, 0, 0])
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("of_tangent", [True, False])
def test_calls_without_a_tangent_are_told_in_every_kind_of_level(
    way: Callable[[Callable[[Tensor], Tensor]], Tensor], of_tangent: bool
) -> None:
    def f(x: Tensor) -> Tensor:
        q = x if of_tangent else x.detach()
        return F.scaled_dot_product_attention(q, q, q) + x

    def plain(x: Tensor) -> Tensor:
        q = x if of_tangent else x.detach()
        return flashjvp.attention(q, q, q) + x

    with flashjvp.replaced(when="jvp") as replaced:
        found = way(f)
    torch.testing.assert_close(found, way(plain))
    if of_tangent:
        assert {row.served_by for row in replaced.report_of.report().rows} == {"flashjvp"}
