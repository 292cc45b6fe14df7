"""Metrics of generated digits: accuracy of a classifier trained on real digits, and Frechet distance on pixels."""

from typing import NamedTuple

import torch
from sklearn.svm import SVC
from torch import Tensor

from ..data.digits import real_digits
from .metrics import frechet_distance


class DigitQuality(NamedTuple):
    """accuracy: fraction of samples classified as their label; frechet: squared Frechet distance on pixels."""

    accuracy: float
    frechet: float


class DigitJudge:
    """A support vector machine, trained on the digits that are not held out in about one second, without randomness.

    held_out_accuracy: its accuracy on the 300 held-out digits.
    """

    def __init__(self) -> None:
        digits = real_digits()
        self._real = torch.from_numpy(digits.images).flatten(1)
        pixels, train = self._real.numpy(), ~digits.held_out
        self._classifier = SVC(C=10.0, kernel="rbf", gamma="scale").fit(pixels[train], digits.labels[train])
        self.held_out_accuracy = float(self._classifier.score(pixels[~train], digits.labels[~train]))

    def judge(self, samples: Tensor, labels: Tensor) -> DigitQuality:
        """Judges `samples` [n, 1, 8, 8], scale [-1, 1], drawn for the classes `labels` int64 [n].

        Pixels are scaled to [0, 1] and clipped, as in an image file. The Frechet distance is to the mean and covariance
        of the 64 pixels over all 1797 real digits. Raises ValueError for other shapes.
        """
        if samples.shape[1:] != (1, 8, 8) or labels.shape != samples.shape[:1]:
            raise ValueError(
                f"expected samples [n, 1, 8, 8] and labels [n], got {list(samples.shape)} and {list(labels.shape)}"
            )
        pixels = ((samples.detach().cpu().float() + 1) / 2).clamp(0, 1).flatten(1)
        frechet = frechet_distance(pixels, self._real)  # raises for NaN and inf
        accuracy = self._classifier.score(pixels.numpy(), labels.cpu().numpy())
        return DigitQuality(float(accuracy), frechet)
