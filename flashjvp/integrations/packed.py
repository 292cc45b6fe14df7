"""Sequences packed one after the other, as xformers and flash_attn take them: a call for those of equal lengths."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Sequence[int], starts_k: Sequence[int], within: Attention
) -> Tensor:
    """`within` of the rows of each sequence: q [total, Hq, D], k [total, Hkv, D], v [total, Hkv, Dv] give
    [total, Hq, Dv]. `within` takes and returns batches of sequences of equal lengths, [B, M, H, D]."""
    lengths = [[b - a for a, b in itertools.pairwise(starts)] for starts in (starts_q, starts_k)]
    rows, keys, values = q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1])
    groups: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(*lengths, strict=True)):
        groups.setdefault(pair, []).append(i)
    results: dict[int, Tensor] = {}
    for (length, _), group in groups.items():
        if length > 0:
            o = within(*(torch.stack([x[i] for i in group]) for x in (rows, keys, values)))
            results.update(zip(group, o.unbind(), strict=True))
    return torch.cat([results[i] for i in sorted(results)])


def bottom_right(q: Tensor, k: Tensor) -> Tensor | None:
    """The causal mask that aligns the last query with the last key, of [B, M, H, D] and [B, N, H, D]; None: M = N."""
    m, n = q.shape[1], k.shape[1]
    return None if m == n else torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
