"""Tensors that were kept from a transform that is over: PyTorch still wraps them, and takes them as what they hold.

A network that is recomputed under func.jvp meets such masks, for example.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import flashjvp

Call = Callable[..., Any]


def kept_from(transform: str, x: Tensor) -> Tensor:
    found: list[Tensor] = []

    def keep(zero: Tensor) -> Tensor:
        found.append(x & (zero == 0) if x.dtype == torch.bool else x + zero)
        return zero.sum()

    zero = torch.zeros(x.shape)
    jvp(keep, (zero,), (zero,)) if transform == "jvp" else grad(keep)(zero)
    assert "GradTrackingTensor" in repr(found[0])
    return found[0]


def in_jvp(call: Call, q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return jvp(lambda q: call(q, *rest), (q,), (q.cos(),))


def in_jvp_of_more(call: Call, q: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The tensor that is kept is part of one that is not."""
    return jvp(lambda s: call(q * s, k * s, *rest), (torch.ones(()),), (torch.ones(()),))


def in_grad_of_jvp(call: Call, q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return (grad(lambda q: in_jvp(call, q, *rest)[1].sin().sum())(q),)


def in_vmap_of_jvp(call: Call, q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = vmap(lambda scale: in_jvp(call, q * scale, *rest))(torch.tensor([1.0, 2.0]))
    return results


def in_no_transform(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    return (call(*tensors),)


def attention_jvp(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    o, o_t = flashjvp.attention_jvp(q, k, v, v, q, k, attn_mask=mask)
    return o + o_t


def checkpointed(*tensors: Tensor) -> Tensor:
    o: Tensor = flashjvp.checkpoint(flashjvp.attention, *tensors)
    return o


LEVELS: dict[Call, list[Call]] = {
    flashjvp.attention: [in_no_transform, in_jvp, in_jvp_of_more, in_grad_of_jvp, in_vmap_of_jvp],
    checkpointed: [in_no_transform, in_jvp, in_jvp_of_more],
    attention_jvp: [in_no_transform],
}


@pytest.mark.parametrize("transform", ["jvp", "grad"])
@pytest.mark.parametrize(
    ("call", "level"),
    [pytest.param(call, level, id=f"{call.__name__}-{level.__name__}") for call in LEVELS for level in LEVELS[call]],
)
def test_they_are_as_what_they_hold(call: Call, level: Call, transform: str) -> None:
    tensors = [*torch.randn(3, 2, 3, 6, 8), torch.rand(6, 6) > 0.2]
    expected = level(call, *tensors)
    for i, x in enumerate(tensors):
        given = [*tensors[:i], kept_from(transform, x), *tensors[i + 1 :]]
        for found, value in zip(level(call, *given), expected, strict=True):
            torch.testing.assert_close(found + 0, value, rtol=0, atol=0)
