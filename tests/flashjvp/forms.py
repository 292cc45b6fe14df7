"""Every form of a call of attention that PyTorch takes, and the numbers to make it with.

B, H, M, N, D and DV are the sizes that shapes are made of (kernels/MATH.md); Q, K and V the usual shapes.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

B, H, M, N, D, DV = 2, 4, 6, 5, 8, 3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "tiled", None])
Shape = tuple[int, ...]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_keys(*shape: int) -> Tensor:
    """Boolean, with no row that is empty: PyTorch's gradients are NaN there."""
    mask = normal(*shape, seed=7) > 0
    mask[..., 0] = True
    return mask


def qkv(q: Shape, k: Shape, v: Shape) -> tuple[Tensor, Tensor, Tensor]:
    return normal(*q, seed=1), normal(*k, seed=2), normal(*v, seed=3)


Q, K, V = (B, H, M, D), (B, H, N, D), (B, H, N, DV)
# What is passed after q, k and v: the shapes of these, positional arguments, keyword arguments.
FORMS: dict[str, tuple[tuple[Shape, Shape, Shape], tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((Q, K, V), (), {}),
    "mask by position": ((Q, K, V), (some_keys(M, N),), {}),
    "all that PyTorch takes by position": ((Q, K, V), (normal(M, N), 0.0, False), {"scale": 0.3, "enable_gqa": False}),
    "causal by position": ((Q, K, V), (None, 0.0, True), {}),
    "causal, more keys": (((B, H, N, D), (B, H, M, D), (B, H, M, DV)), (), {"is_causal": True}),
    "integer dropout": ((Q, K, V), (None, 0), {}),
    "scale": ((Q, K, V), (), {"scale": 0.7}),
    "integer scale": ((Q, K, V), (), {"scale": 1}),
    "numpy scale": ((Q, K, V), (), {"scale": np.float32(0.5)}),
    "negative scale": ((Q, K, V), (), {"scale": -0.5}),
    "mask [1, N]": ((Q, K, V), (), {"attn_mask": some_keys(1, N)}),
    "mask [M, 1]": ((Q, K, V), (), {"attn_mask": normal(M, 1)}),
    "mask [H, 1, N]": ((Q, K, V), (), {"attn_mask": some_keys(H, 1, N)}),
    "mask [B, 1, 1, N]": ((Q, K, V), (), {"attn_mask": some_keys(B, 1, 1, N)}),
    "mask [B, H, M, N]": ((Q, K, V), (), {"attn_mask": normal(B, H, M, N)}),
    "mask with -inf": ((Q, K, V), (), {"attn_mask": some_keys(M, N).double().log()}),
    "mask of one head": (((3, B, H, M, D), (3, B, H, N, D), (3, B, H, N, DV)), (some_keys(3, 1, H, 1, N),), {}),
    "batch of q": (((1, H, M, D), K, V), (), {}),
    "batch of k and v": ((Q, (1, H, N, D), (1, H, N, DV)), (some_keys(B, 1, M, N),), {}),
    "batch of each": (((3, 1, H, M, D), (1, 2, H, N, D), (3, 2, H, N, D)), (), {}),
    "one key head": ((Q, (B, 1, N, D), (B, 1, N, DV)), (), {}),
    "one key head, many value heads": ((Q, (B, 1, N, D), V), (), {}),
    "one value head, many key heads": ((Q, K, (B, 1, N, DV)), (), {}),
    "one query head": (((B, 1, M, D), K, V), (some_keys(H, M, N),), {}),
    "gqa": ((Q, (B, 2, N, D), (B, 2, N, DV)), (), {"enable_gqa": True}),
    "gqa of one key head": ((Q, (B, 1, N, D), (B, 1, N, DV)), (), {"enable_gqa": True}),
    "gqa of equal heads": ((Q, K, V), (), {"enable_gqa": True}),
    "gqa and batch": ((Q, (1, 2, N, D), (B, 2, N, DV)), (normal(H, M, N),), {"enable_gqa": True}),
    "rank 2": (((M, D), (N, D), (N, DV)), (), {}),
    "rank 2, mask": (((M, D), (N, D), (N, DV)), (some_keys(M, N),), {}),
    "rank 3": (((H, M, D), (H, N, D), (H, N, DV)), (some_keys(1, N),), {}),
    "rank 3, gqa": (((H, M, D), (2, N, D), (2, N, DV)), (), {"enable_gqa": True}),
    "rank 6": (((2, 1, 2, H, M, D), (2, 1, 2, H, N, D), (2, 1, 2, H, N, DV)), (some_keys(2, 1, 1, N),), {}),
    "empty batch": (((0, H, M, D), (0, H, N, D), (0, H, N, DV)), (), {}),
    "empty batch by broadcasting": (((0, H, M, D), (1, H, N, D), (0, H, N, DV)), (), {}),
    "no queries": (((B, H, 0, D), K, V), (), {}),
    "no queries, mask": (((B, H, 0, D), K, V), (some_keys(B, 1, 1, N),), {}),
    "no keys": ((Q, (B, H, 0, D), (B, H, 0, DV)), (), {}),
    "no keys, causal": ((Q, (B, H, 0, D), (B, H, 0, DV)), (), {"is_causal": True}),
    "no keys, bias": ((Q, (B, H, 0, D), (B, H, 0, DV)), (normal(M, 0),), {}),
    "no queries, no keys": (((0, D), (0, D), (0, DV)), (), {}),
    "no columns": (((B, H, M, 0), (B, H, N, 0), V), (), {}),
    "no columns, gqa": (((B, H, M, 0), (B, 2, N, 0), (B, 2, N, DV)), (some_keys(M, N),), {"enable_gqa": True}),
    "no value columns": ((Q, K, (B, H, N, 0)), (), {}),
    "no value columns, rank 2": (((M, D), (N, D), (N, 0)), (), {}),
    "wide heads": (((1, M, 300), (1, N, 300), (1, N, 520)), (), {}),
    "gqa, one value head": ((Q, (B, 2, N, D), (B, 1, N, DV)), (), {"enable_gqa": True}),
    "gqa, one key head": ((Q, (B, 1, N, D), (B, 2, N, DV)), (), {"enable_gqa": True}),
    "gqa, 4 key heads and 6 value heads": (
        ((B, 12, M, D), (B, 4, N, D), (1, 6, N, DV)), (some_keys(B, 1, M, N),), {"enable_gqa": True}
    ),
    "scale of a tensor": ((Q, K, V), (), {"scale": torch.tensor(0.3)}),
    "scale of an integer tensor": ((Q, K, V), (), {"scale": torch.tensor(2)}),
    "dropout of a tensor": ((Q, K, V), (None, torch.tensor(0.0)), {}),
    "one of each": (((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)), (), {}),
}  # fmt: skip
