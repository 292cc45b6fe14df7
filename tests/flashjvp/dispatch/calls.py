"""The two public functions on the tensors of a test, and calls after which the next one skips the dispatcher."""

from typing import Any

from torch import Tensor

import flashjvp
from tests.flashjvp.dispatch.subjects import Tensors, tensors


def explicit(x: Tensors, backend: str = "tiled", **options: Any) -> tuple[Tensor, Tensor]:
    return flashjvp.attention_jvp(*x, **{"enable_gqa": True, "backend": backend, **options})


def plain(x: Tensors, backend: str = "tiled") -> Tensor:
    return flashjvp.attention(*x.primals, enable_gqa=True, backend=backend)


def warm(**options: Any) -> None:
    """Calls after which one like them takes the short way."""
    for seed in range(3):
        explicit(tensors(seed), **options)
        plain(tensors(seed))
