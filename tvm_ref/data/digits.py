"""The handwritten digits that come with scikit-learn: 1797 grey images of 8 x 8 pixels, with labels 0 to 9."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 300


class RealDigits(NamedTuple):
    """All digits: images float32 [1797, 8, 8] in [0, 1], labels int64 [1797], held_out bool [1797].

    held_out marks the test set, a fixed choice of 300 images (29 to 31 of each class). Neither the network nor the
    classifier is trained on them.
    """

    images: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray


def real_digits() -> RealDigits:
    """Returns all digits, in scikit-learn's order."""
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    _, chosen = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[chosen] = True
    return RealDigits(images, labels, held_out)


class Digits:
    """The training set: the 1497 digits that are not held out, scaled to [-1, 1]. Shape (1, 8, 8), ten classes."""

    shape = (1, 8, 8)
    num_classes = 10

    def __init__(self) -> None:
        digits = real_digits()
        self._images = torch.from_numpy(2 * digits.images[~digits.held_out] - 1)[:, None]
        self._labels = torch.from_numpy(digits.labels[~digits.held_out])

    def __len__(self) -> int:
        return len(self._labels)

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns images float32 [n, 1, 8, 8] and labels int64 [n]."""
        chosen = torch.from_numpy(indices)
        return self._images[chosen], self._labels[chosen]
