"""Figures of generated digits: accuracy of a classifier of real digits, how near to these they are, how diverse."""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from ..data.digits import real_digits
from .diversity import variance_ratio
from .metrics import frechet_distance, precision_recall

BOOTSTRAPS = 4  # of the real digits, whose mean is reported


class DigitQuality(NamedTuple):
    """Figures of samples beside all 1797 real digits; pixels in [0, 1].

    accuracy: fraction classified as their label; frechet: squared Frechet distance; precision, recall: as in `metrics`;
    variance: that within classes, over the real one.
    """

    accuracy: float
    frechet: float
    precision: float
    recall: float
    variance: float


class DigitJudge:
    """A support vector machine, trained on the digits that are not held out in about one second, without randomness.

    held_out_accuracy: its accuracy on the 300 held-out digits.
    """

    def __init__(self) -> None:
        digits = real_digits()
        self._real, self._labels = torch.from_numpy(digits.images).flatten(1), torch.from_numpy(digits.labels)
        pixels, train = self._real.numpy(), ~digits.held_out
        self._classifier = SVC(C=10.0, kernel="rbf", gamma="scale").fit(pixels[train], digits.labels[train])
        self.held_out_accuracy = float(self._classifier.score(pixels[~train], digits.labels[~train]))

    def judge(self, samples: Tensor, labels: Tensor) -> DigitQuality:
        """Judges `samples` [n, 1, 8, 8], scale [-1, 1], drawn for the classes `labels` int64 [n].

        Pixels are scaled to [0, 1] and clipped, as in an image file. Raises ValueError for other shapes, for fewer than
        four samples or without two of a class, and for values that are not finite.
        """
        if samples.shape[1:] != (1, 8, 8) or labels.shape != samples.shape[:1]:
            raise ValueError(
                f"expected samples [n, 1, 8, 8] and labels [n], got {list(samples.shape)} and {list(labels.shape)}"
            )
        pixels = ((samples.detach().cpu().float() + 1) / 2).clamp(0, 1).flatten(1)
        return self._figures(pixels, labels.cpu())

    def bootstrap(self, count: int, seed: int) -> DigitQuality:
        """What real digits get: the mean figures of a few sets of `count` of them, drawn with replacement.

        Their precision is 1, being some of those that they are compared with, and the classifier has seen most.
        """
        random = np.random.default_rng([seed])
        sets = [torch.from_numpy(random.integers(len(self._real), size=count)) for _ in range(BOOTSTRAPS)]
        figures = [self._figures(self._real[chosen], self._labels[chosen]) for chosen in sets]
        return DigitQuality(*(float(np.mean(values)) for values in zip(*figures, strict=True)))

    def _figures(self, pixels: Tensor, labels: Tensor) -> DigitQuality:
        frechet = frechet_distance(pixels, self._real)  # raises for NaN and inf
        accuracy = self._classifier.score(pixels.numpy(), labels.numpy())
        covered = precision_recall(pixels, self._real)
        variance = variance_ratio(pixels, labels, self._real, self._labels)
        return DigitQuality(float(accuracy), frechet, *covered, variance)
