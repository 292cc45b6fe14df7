"""What the wiring tests compare: attention with the real operators against dense attention that PyTorch differentiates
itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashjvp

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Tensors(NamedTuple):
    """Primals and tangents of a grouped-query call in float64, where the backends agree with autograd to rounding."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Tensor
    k_t: Tensor
    v_t: Tensor

    @property
    def primals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def tangents(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_t, self.k_t, self.v_t

    def leaves(self) -> "Tensors":
        return Tensors(*(x.detach().clone().requires_grad_() for x in self))


def tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (2, 4, 7, 6), (2, 2, 9, 6), (2, 2, 9, 5)
    return Tensors(draw(*q), draw(*k), draw(*v), draw(*q), draw(*k), draw(*v))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function, written so that every derivative is PyTorch's own."""
    group = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def of_backend(backend: str) -> Attention:
    return lambda q, k, v: flashjvp.attention(q, k, v, enable_gqa=True, backend=backend)


def assert_same(actual: Any, expected: Any) -> None:
    """Equality to float64 rounding of tensors, None and nests of them."""
    torch.testing.assert_close(actual, expected)


class CountLaunches(TorchDispatchMode):
    """Counts the operators of flashjvp that reach a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "flashjvp":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[list[str]]:
    counter = CountLaunches()
    with counter:
        yield counter.names
