"""Standard normal noise that is a function of (key, index): no state, so batches may be split in any way."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def indexed_normals(key: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Independent N(0, 1) numbers, float32 [n, *shape] on the CPU; row j depends on `key` and on indices[j] only.

    `key` and the indices lie in [0, 2^64): the key of NumPy's counter-based generator Philox. Raises ValueError
    outside.
    """
    rows = []
    for index in indices:
        if not 0 <= key < 2**64 or not 0 <= index < 2**64:
            raise ValueError(f"key and indices must lie in [0, 2^64), got key {key}, index {index}")
        philox = np.random.Philox(key=np.array([key, index], dtype=np.uint64))
        rows.append(np.random.Generator(philox).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
