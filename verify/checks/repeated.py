"""Repeated calls: one like an earlier call, which may take a shorter way, must give the same bits as the first."""

from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from flashjvp import _torch

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs, place
from ..oracles.attention import Results, Subject


def stateless(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A call repeated after one of the same shapes with other numbers gives the same bits."""
    first = subject.results(inputs)
    subject.results(replace(inputs, q=-inputs.q, v=inputs.v + 1))
    return tolerance.same_bits(subject.results(inputs), first)


def repeated(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Calls like earlier ones, which may take shorter ways, give the bits of calls that are as the first.

    Between the repetitions come calls of the same shapes with other numbers, strides, alignment and options.
    """
    calls = {
        "the same": inputs,
        "other numbers": inputs.map(lambda x: x.flip(-2)),
        "other strides": inputs.map(lambda x: place(x, "sequence_major") if x.ndim > 2 else x),
        "other alignment": inputs.map(_off_by_one),
        "another scale": replace(inputs, scale=2 * inputs.c),
        "another causality": replace(inputs, is_causal=not inputs.is_causal),
    }

    def give(call: Inputs) -> tuple[Results, Tensor]:
        return subject.results(call), subject.attention(call)(call.q, call.k, call.v)

    with patch.object(_torch, "TensorGuards", None):  # nothing is remembered
        first = {name: give(call) for name, call in calls.items()}
    found = []
    for _ in range(2):  # the first of which is remembered
        again = {name: give(call) for name, call in calls.items()}
        for name, (results, o) in again.items():
            identities = tolerance.same_bits(results, first[name][0])
            found += [replace(identity, quantity=f"{identity.quantity}, {name}") for identity in identities]
            found.append(Identity(f"o without a graph, {name}", None, None, torch.equal(o, first[name][1])))
    return found


def _off_by_one(x: Tensor) -> Tensor:
    """A copy that starts one element after an aligned address."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
