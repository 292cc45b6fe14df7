"""Sequences packed one after the other, as xformers and flash_attn take them: `flashjvp.varlen`, or what it lacks."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FlashJVPError
from ..varlen import varlen

if TYPE_CHECKING:
    from .replaced import Replaced

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_varlen(
    context: "Replaced", name: str, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor,
    is_causal: bool, scale: float | None,
) -> Tensor | None:  # fmt: skip
    """Attention within each sequence of q [total, Hq, D], k [total, Hkv, D], v [total, Hkv, Dv]: [total, Hq, Dv].

    Causal is aligned at the bottom right. None where flashjvp refuses and the context allows dense equations, and with
    a precision, which `varlen` does not have.
    """
    if context.precision is not None:
        return None
    try:
        o = varlen(q, k, v, starts_q, starts_k, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    except FlashJVPError:
        if context.fallback == "dense":
            return None
        raise
    context.report_of.add_attention(name, q)
    return o


def by_lengths(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Sequence[int], starts_k: Sequence[int], within: Attention
) -> Tensor:
    """The same for what varlen has no argument for: a call of `within` for all sequences of equal lengths, [B, M, H, D]
    each."""
    lengths = [[b - a for a, b in itertools.pairwise(starts)] or [0] for starts in (starts_q, starts_k)]
    rows, keys, values = q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1])
    groups: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(*lengths, strict=True)):
        groups.setdefault(pair, []).append(i)
    results: dict[int, Tensor] = {}
    for group in groups.values():
        o = within(*(torch.stack([x[i] for i in group]) for x in (rows, keys, values)))
        results.update(zip(group, o.unbind(), strict=True))
    return torch.cat([results[i] for i in sorted(results)])


def bottom_right(q: Tensor, k: Tensor) -> Tensor | None:
    """The causal mask that aligns the last query with the last key, of [B, M, H, D] and [B, N, H, D]; None: M = N."""
    m, n = q.shape[1], k.shape[1]
    return None if m == n else torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
