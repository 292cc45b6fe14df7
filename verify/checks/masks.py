"""Special masks: PyTorch's causal bias objects."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Subject


def causal_biases(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A causal bias of torch.nn.attention.bias gives what the mask that it means gives."""
    # Importing it imports the compiler and with it triton, before TRITON_INTERPRET is set.
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

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
