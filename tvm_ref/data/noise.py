"""Reproducible normal noise. Each item's noise depends on a key and the item's index, not on how batches are split."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def indexed_normals(key: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Draws N(0, 1) noise, float32 [n, *shape] on the CPU. Row j depends on `key` and indices[j] only.

    (key, index) is the key of NumPy's counter-based generator Philox. Both must lie in [0, 2^64), or ValueError is
    raised.
    """
    rows = []
    for index in indices:
        if not 0 <= key < 2**64 or not 0 <= index < 2**64:
            raise ValueError(f"key and indices must lie in [0, 2^64), got key {key}, index {index}")
        philox = np.random.Philox(key=np.array([key, index], dtype=np.uint64))
        rows.append(np.random.Generator(philox).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
