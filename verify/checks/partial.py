"""Windows and block masks: each gives what the boolean mask that it means gives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..budget import tolerance
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import Subject, run

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def windows(inputs: Inputs, subject: Subject) -> list[Identity]:
    """A window of both sides, and one that is bounded on the left alone, beside the case's own mask."""
    m, n = inputs.q.shape[-2], inputs.k.shape[-2]
    key = torch.arange(n, device=inputs.q.device)
    aligned = torch.arange(m, device=inputs.q.device)[:, None] + n - m
    left, right = n // 4, n // 8
    found = []
    for window, keep in (
        ((left, right), (key >= aligned - left) & (key <= aligned + right)),
        ((left, None), key >= aligned - left),
    ):
        explicit = _masked(inputs, keep)
        identities = tolerance.same_results(
            run(inputs, subject.backend, window=window), subject.results(explicit), explicit, explicit
        )
        found += [replace(identity, quantity=f"{identity.quantity}, window {window}") for identity in identities]
    return found


def block_masks(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Packed documents, and a causal mask with a prefix that every query sees, longer from head to head. The case's own
    mask is left out."""
    # Importing it imports the compiler and with it triton, before TRITON_INTERPRET is set.
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    heads, m, n = inputs.q.shape[-3], inputs.q.shape[-2], inputs.k.shape[-2]

    def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (3 * i // m == 3 * j // n) & (j < n - 1)

    def prefix(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j * m <= i * n) | (j < 5 + 7 * h)

    whole = replace(inputs, mask=None)
    found = []
    masks: tuple[tuple[str, Mask, int], ...] = (("documents", documents, 1), ("prefix", prefix, heads))
    for name, mask, of_heads in masks:
        device = str(inputs.q.device)
        block_mask: Any = create_block_mask(mask, None, of_heads, m, n, device=device)
        listed = replace(whole, mask=block_mask)
        explicit = replace(whole, mask=create_mask(mask, None, of_heads, m, n, device=device)[0])
        identities = tolerance.same_results(subject.results(listed), subject.results(explicit), explicit, explicit)
        found += [replace(identity, quantity=f"{identity.quantity}, {name}") for identity in identities]
    return found


def _masked(inputs: Inputs, keep: Tensor) -> Inputs:
    """With the keys that are not to be kept masked, too."""
    if inputs.mask is None:
        return replace(inputs, mask=keep)
    if inputs.mask.dtype == torch.bool:
        return replace(inputs, mask=inputs.mask & keep)
    return replace(inputs, mask=inputs.mask.masked_fill(~keep, -torch.inf))
