"""Special masks: PyTorch's causal bias objects, and masks that need a derivative, which are refused."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from flashjvp import UnsupportedError

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Subject


def causal_biases(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A causal bias of torch.nn.attention.bias gives what the mask that it means gives."""
    m, n = inputs.q.shape[-2], inputs.k.shape[-2]
    every = torch.ones(m, n, dtype=torch.bool, device=inputs.q.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own attention gives NaN for rows without a key
        biases: dict[str, tuple[Any, Tensor]] = {
            "upper left": (causal_upper_left(m, n), every.tril()),
            "lower right": (causal_lower_right(m, n), every.tril(n - m)),
        }
    found = []
    for name, (bias, mask) in biases.items():
        given, explicit = (replace(inputs, mask=x, is_causal=False) for x in (bias, mask))
        identities = tolerance.same_results(subject.results(given), subject.results(explicit), explicit, explicit)
        found += [replace(identity, quantity=f"{identity.quantity}, {name}") for identity in identities]
    return found


def gradients_of_masks(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A mask that needs a gradient or has a tangent raises UnsupportedError, at whatever level it was computed."""
    q = inputs.q
    bias = torch.zeros(q.shape[-2], inputs.k.shape[-2], dtype=q.dtype, device=q.device)
    ones, q_t = torch.ones_like(bias), torch.ones_like(q)

    def attention(mask: Tensor, q: Tensor = q) -> Tensor:
        return subject.attention(replace(inputs, mask=2 * mask))(q, inputs.k, inputs.v)

    def with_tangents(mask: Tensor) -> Tensor:
        return subject.forward(replace(inputs, mask=2 * mask)).o

    def in_dual_level(of: Callable[[Tensor], Tensor]) -> None:
        with forward_ad.dual_level():
            of(forward_ad.make_dual(bias, ones))

    ways: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
        "requires_grad": lambda of: of(bias.clone().requires_grad_()),
        "func.grad": lambda of: grad(lambda mask: of(mask).sum())(bias),
        "func.jvp": lambda of: jvp(of, (bias,), (ones,)),
        "dual level": in_dual_level,
    }
    refused: dict[str, Callable[[], Any]] = {}
    for name, way in ways.items():
        refused[name] = functools.partial(way, attention)
        refused[f"{name}, with tangents"] = functools.partial(way, with_tangents)
    refused["func.jvp in q inside func.grad in the mask"] = lambda: grad(
        lambda mask: jvp(lambda q: attention(mask, q), (q,), (q_t,))[1].sum()
    )(bias)
    refused["func.grad in q inside func.jvp in the mask"] = lambda: jvp(
        lambda mask: grad(lambda q: attention(mask, q).sum())(q), (bias,), (ones,)
    )
    refused["func.jvp in q and the mask"] = lambda: jvp(attention, (bias, q), (ones, q_t))
    return [_refuses(name, call) for name, call in refused.items()]


def _refuses(name: str, call: Callable[[], Any]) -> Identity:
    try:
        call()
    except UnsupportedError as error:
        return Identity(name, None, None, str(error).startswith("attn_mask: "), f"got the error {error}")
    return Identity(name, None, None, False, "expected UnsupportedError, got a result")
