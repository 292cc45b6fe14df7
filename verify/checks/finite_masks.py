"""Additive masks of finite numbers, also ones so large that the scores of a whole row are lost in rounding.

Next to a bias of -1e9 a score of order one rounds away, in dense attention as in a kernel: all keys of the row then
share it evenly. What a kernel computes must be that softmax, in both passes.
"""

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Subject
from ..oracles.identities import multiples

PADDING = 3
"""The number of keys at the left that are padding."""


def finite_masks(inputs: Inputs, subject: Subject) -> list[Identity]:
    """All results are those of dense attention whose scores are rounded once, after the bias was added."""
    found = []
    exact = _with_exact_scores(inputs)
    for name, mask, is_causal in (
        ("rows", _rows(inputs), False),
        ("causal rows", _rows(inputs), True),
        ("padding", _padding(inputs), False),
    ):
        call = replace(exact, mask=mask, is_causal=is_causal)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy, which interprets kernels: keys beyond the last one
            results = subject.results(call)
        identities = tolerance.same_as_rounded_scores(results, call)
        found += [replace(identity, quantity=f"{identity.quantity}, {name}") for identity in identities]
    return found


def _with_exact_scores(inputs: Inputs) -> Inputs:
    """q and k of few digits and a scale that is a power of two: scores without a mask are then exact in every type, and
    their sum with a bias is rounded the same way by all."""
    q, k = (multiples(x.clamp(-4, 4), 1 / 8) for x in (inputs.q, inputs.k))
    scale = math.copysign(2.0 ** round(math.log2(abs(inputs.c))), inputs.c)
    return replace(inputs, q=q, k=k, scale=scale)


def _rows(inputs: Inputs) -> Tensor:
    """[M, N]: every key of a row carries the same number, row after row another one; every sixth row small ones."""
    m, n = inputs.q.shape[-2], inputs.k.shape[-2]
    dtype = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    numbers = [0.0, torch.finfo(dtype).min, -1e9, -1e6, -1e4, 3e38]
    row = torch.tensor(numbers, dtype=dtype, device=inputs.q.device)[torch.arange(m) % len(numbers), None]
    small = torch.linspace(-1, 1, n, dtype=dtype, device=inputs.q.device)
    return torch.where(row == 0, small, row)


def _padding(inputs: Inputs) -> Tensor:
    """[M, N] in the type of q: its least number where a key is padding or comes after the query, else 0.

    As transformers makes it of padding at the left: the padded queries see no key, and all their keys carry the number.
    """
    m, n, q = inputs.q.shape[-2], inputs.k.shape[-2], inputs.q
    keep = torch.ones(m, n, dtype=torch.bool, device=q.device).tril()
    keep[:, :PADDING] = False
    return torch.zeros(m, n, dtype=q.dtype, device=q.device).masked_fill(~keep, torch.finfo(q.dtype).min)
