"""Which probabilities dropout keeps: a counter-based generator in PyTorch's integer arithmetic; MATH.md, section 8.

Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The kernels compute
the same numbers (kernels/portable/dropout.py), so that every backend drops the same ones.
"""

import math

import torch
from torch import Tensor

_WORD = (1 << 32) - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS_OF_KEY = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_BITS = 31  # of a random number that are compared with the probability


def threshold(dropout_p: float) -> int:
    """Random numbers of 31 bits from here on keep a probability."""
    return min(round(dropout_p * 2**_BITS), 2**_BITS - 1)


def factor(dropout_p: float) -> float:
    """What a probability that is kept is multiplied with: 1 / (1 - p), and 0 for p = 1; (26)."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def kept(seed: Tensor, batch: Tensor, head: Tensor, m: Tensor, n: Tensor, dropout_p: float) -> Tensor:
    """Z of (26), boolean, at positions whose coordinates broadcast, as the seeds (int64) do."""
    return philox(seed, n, m, head, batch) >> 1 >= threshold(dropout_p)


def kept_everywhere(seed: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """Z for scores of `shape` [*batch, Hq, M, N]."""
    *batch, heads, queries, keys = shape
    seed, entry = seeds_and_entries(seed, tuple(batch))
    head, m, n = (torch.arange(size, device=seed.device) for size in (heads, queries, keys))
    return kept(seed, entry, head[:, None, None], m[:, None], n, dropout_p)


def seeds_and_entries(seed: Tensor, batch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The seed, and the number within the calls of one seed, of every batch entry: both [*batch, 1, 1, 1] or dims of 1.

    `seed` has the leading batch dims whose entries are calls of their own, as vmap makes them.
    """
    inner = batch[seed.ndim :]
    entries = torch.arange(math.prod(inner), device=seed.device).view(*(1,) * seed.ndim, *inner, 1, 1, 1)
    return seed.reshape(*seed.shape, *(1,) * (len(inner) + 3)), entries


def philox(seed: Tensor, *counter: Tensor) -> Tensor:
    """The first of the four 32-bit words of a counter of four, as int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        high_0, low_0 = _product(c0, _MULTIPLIERS[0])
        high_2, low_2 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + _STEPS_OF_KEY[0] & _WORD, k1 + _STEPS_OF_KEY[1] & _WORD
    return c0


def _product(x: Tensor, y: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two 32-bit numbers. That its sign wraps in int64 changes neither."""
    product = x * y
    return product >> 32 & _WORD, product & _WORD
