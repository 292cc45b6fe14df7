"""How many functions, of Python and of C, a call like earlier ones calls.

That is what the host's time of a call follows, and unlike time it is the same on every machine. The backend is a
stand-in, so that nothing of a kernel is counted. What PyTorch itself does around a transform, a backward pass or
autocast is taken off. The bounds are a tenth above the numbers found with Python 3.11, which PyTorch 2.11 and 2.14
share. Later Pythons call less, since comprehensions are no functions there.
"""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import jvp, vmap

import flashjvp
from flashjvp.backends import tiled, varlen
from flashjvp.dispatch import fast_path


def calls(function: Callable[[], Any]) -> int:
    """Of one call, after enough others that it is one like them."""
    for _ in range(4):
        function()
    found = 0

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


Maybe = Tensor | None
LENGTHS = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)


class _Empty(Function):
    """Nothing, of as many inputs, outputs and gradients as attention has."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs[0].clone(), inputs[0].clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        return cotangents * 3


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = [torch.zeros(1, 2, 4, 8) for _ in range(2)] + [torch.zeros(1, 2, 4) for _ in range(2)]
    grads = [torch.zeros(1, 2, 4, 8) for _ in range(6)]

    def forward(*x: Any) -> tuple[Tensor, ...]:
        return tuple([y.to(x[0].dtype) for y in made])

    def backward(*x: Any) -> tuple[Maybe, ...]:
        return *grads, None, None

    monkeypatch.setattr(tiled, "forward_jvp", forward)
    monkeypatch.setattr(tiled, "backward_jvp", backward)
    one_by_one = varlen._one_by_one(tiled)
    monkeypatch.setattr(one_by_one, "forward_jvp", lambda *x: tuple([y[0] for y in forward(*x)]))
    monkeypatch.setattr(one_by_one, "backward_jvp", lambda *x: tuple([y if y is None else y[0] for y in backward(*x)]))
    monkeypatch.setattr(sys.modules["flashjvp.varlen"], "_is_readable", lambda lengths: False)  # as on a GPU
    fast_path.forget()
    yield
    fast_path.forget()


def draw(learned: bool = False) -> tuple[Tensor, ...]:
    return tuple([torch.randn(1, 2, 4, 8, requires_grad=learned) for _ in range(6)])


def attend(*tensors: Tensor, mask: Tensor | None = None) -> Tensor:
    return flashjvp.attention(*tensors, mask)


def first(*tensors: Tensor) -> Tensor:
    return tensors[0]


def first_two(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors[:2]


def explicit() -> int:
    x = draw()
    return calls(lambda: flashjvp.attention_jvp(*x))


def with_a_node() -> int:
    x = draw(True)
    return calls(lambda: flashjvp.attention_jvp(*x))


def backward() -> int:
    x, cotangents = draw(True), draw()[:2]
    return passes(flashjvp.attention_jvp, x, cotangents) - passes(_Empty.apply, x, cotangents)


def passes(function: Callable[..., Any], x: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> int:
    """Backward passes."""
    return calls(lambda: torch.autograd.grad(function(*x), x, cotangents)) - calls(lambda: function(*x))


def draw_packed(learned: bool = False) -> tuple[Tensor, ...]:
    return tuple([y[0].detach().requires_grad_(learned) for y in draw()])


def attend_packed(*x: Tensor) -> tuple[Tensor, Tensor]:
    return flashjvp.attention_varlen_jvp(*x[:3], *LENGTHS, None, None, *x[3:])


def packed() -> int:
    x = draw_packed()
    return calls(lambda: attend_packed(*x))


def packed_with_a_node() -> int:
    x = draw_packed(True)
    return calls(lambda: attend_packed(*x))


def packed_backward() -> int:
    x, cotangents = draw_packed(True), draw_packed()[:2]
    return passes(attend_packed, x, cotangents) - passes(_Empty.apply, x, cotangents)


def windowed() -> int:
    x, function = draw(), cast(Any, tiled.forward_jvp)
    function.bind = lambda _, options: lambda tensors: function(*tensors, *options)  # as one with kernels has
    return calls(lambda: flashjvp.attention_jvp(*x, window=(1, 2)))


def autocast() -> int:
    x = draw()

    def casts(function: Callable[..., Any]) -> int:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                function(*x)

        return calls(run)

    return casts(flashjvp.attention_jvp) - casts(first)


def func_jvp(mask: Tensor | None = None) -> int:
    x = draw()
    of = lambda *tensors: attend(*tensors, mask=mask)  # noqa: E731
    return calls(lambda: jvp(of, x[:3], x[3:])) - calls(lambda: jvp(first, x[:3], x[3:]))


def func_jvp_with_a_mask() -> int:
    return func_jvp(torch.ones(4, 4, dtype=torch.bool))


def mapped() -> int:
    x = [y[None] for y in draw()]
    return calls(lambda: vmap(flashjvp.attention_jvp)(*x)) - calls(lambda: vmap(first_two)(*x))


@pytest.mark.parametrize(
    ("count", "most"),
    [
        (explicit, 32), (with_a_node, 42), (backward, 20), (autocast, 40), (func_jvp, 95), (func_jvp_with_a_mask, 104),
        (mapped, 76), (packed, 62), (packed_with_a_node, 71), (packed_backward, 22), (windowed, 47),
    ],
)  # fmt: skip
def test_calls_of_functions(count: Callable[[], int], most: int) -> None:
    assert count() <= most
