"""Which tensors carry a tangent, at whatever level of a call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashjvp._torch import carries_tangent

X = torch.ones(3)
Body = Callable[[Any], Tensor]


def jvp(body: Body) -> None:
    torch.func.jvp(body, (X,), (X,))


def grad(body: Body) -> None:
    torch.func.grad(lambda x: body(x).sum())(X)


def vmap(body: Body) -> None:
    torch.vmap(body)(X.expand(2, 3))


def dual(body: Body) -> None:
    with forward_ad.dual_level():
        body(forward_ad.make_dual(X, X))


LEVELS = {"jvp": jvp, "grad": grad, "vmap": vmap, "dual level": dual}


@pytest.mark.parametrize("inner", LEVELS)
@pytest.mark.parametrize("outer", LEVELS)
def test_a_tangent_is_seen_from_within_another_level(outer: str, inner: str) -> None:
    seen: list[tuple[bool, ...]] = []

    def outside(x: Tensor) -> Tensor:
        def inside(y: Tensor) -> Tensor:
            seen.append(tuple(map(carries_tangent, (x, y, x * y, x.detach(), X, X * 2))))
            return x * y

        LEVELS[inner](inside)
        return x * 1

    if {outer, inner} <= {"jvp", "dual level"} and (outer, inner) != ("jvp", "jvp"):
        with pytest.raises(RuntimeError, match="Nested forward mode"):  # what carries_tangent builds on
            LEVELS[outer](outside)
        return
    LEVELS[outer](outside)
    x_has, y_has = outer in ("jvp", "dual level"), inner in ("jvp", "dual level")
    assert seen == [(x_has, y_has, x_has or y_has, False, False, False)]
