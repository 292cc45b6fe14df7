"""Figures of generated grey images by the features of a classifier of real ones: digits or Fashion-MNIST."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import DataConfig
from ..data.digits import real_digits
from ..data.fashion import real_fashion
from .classifier import DIGITS, FASHION, train_classifier
from .metrics import coverage, frechet_distance, precision_recall


class FeatureQuality(NamedTuple):
    """Figures of samples beside real images, but for accuracy on the features of the classifier.

    accuracy: fraction classified as their label; frechet: squared Frechet distance; precision, recall, coverage: as in
    `metrics`.
    """

    accuracy: float
    frechet: float
    precision: float
    recall: float
    coverage: float


class RealImages(NamedTuple):
    """Images [n, 1, H, W] in [-1, 1] with labels [n]: those to train a classifier on, and those to compare with.

    held_out: which of the latter [m] are not among the former.
    """

    train: Tensor
    train_labels: Tensor
    compared: Tensor
    compared_labels: Tensor
    held_out: Tensor


class FeatureJudge:
    """A classifier trained on the training images by its recipe, and the features of the real images.

    Samples are compared with all 1797 digits, or with the 10 000 images of Fashion-MNIST's test set.
    """

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        """Trains the classifier: seconds for digits, minutes for fashion on a CPU. Raises as `open_dataset`."""
        if data.name not in ("digits", "fashion"):
            raise ValueError(f"data: expected digits or fashion, got {data.name!r}")
        real = _digits() if data.name == "digits" else _fashion(Path(data.path))
        recipe = DIGITS if data.name == "digits" else FASHION
        self._classifier = train_classifier(real.train, real.train_labels, recipe, device)
        self._features, found = self._classifier.judged(real.compared)
        self.labels = real.compared_labels
        right = (found == self.labels)[real.held_out]
        self.held_out_accuracy = float(right.double().mean())

    def judge(self, samples: Tensor, labels: Tensor) -> FeatureQuality:
        """Judges `samples` [n, 1, H, W], scale [-1, 1], drawn for the classes `labels` int64 [n].

        Raises ValueError for fewer than six samples and for values that are not finite.
        """
        if not samples.isfinite().all():
            raise ValueError("samples: expected finite numbers, got some that are not")
        features, found = self._classifier.judged(samples)
        return self._figures(features, float((found == labels.cpu()).double().mean()))

    def bootstrap(self, count: int, seed: int) -> FeatureQuality:
        """What `count` real images get, drawn with replacement from those that samples are compared with.

        Their precision is 1, being some of these; accuracy: that on images that the classifier has not seen.
        """
        chosen = torch.from_numpy(np.random.default_rng([seed]).integers(len(self._features), size=count))
        return self._figures(self._features[chosen], self.held_out_accuracy)

    def _figures(self, features: Tensor, accuracy: float) -> FeatureQuality:
        frechet = frechet_distance(features, self._features)
        covered = precision_recall(features, self._features)
        return FeatureQuality(accuracy, frechet, *covered, coverage(features, self._features))


@lru_cache(maxsize=2)
def feature_judge(data: DataConfig, device: torch.device) -> FeatureJudge:
    """The judge of a data set; its classifier is trained once in a process."""
    return FeatureJudge(data, device)


def _digits() -> RealImages:
    digits = real_digits()
    images, labels = torch.from_numpy(2 * digits.images - 1)[:, None], torch.from_numpy(digits.labels)
    held_out = torch.from_numpy(digits.held_out)
    return RealImages(images[~held_out], labels[~held_out], images, labels, held_out)


def _fashion(folder: Path) -> RealImages:
    train, test = (real_fashion(folder, held_out=held_out) for held_out in (False, True))
    images, others = (torch.from_numpy(part.images.copy())[:, None].float() / 127.5 - 1 for part in (train, test))
    unseen = torch.ones(len(others), dtype=torch.bool)
    return RealImages(images, torch.from_numpy(train.labels), others, torch.from_numpy(test.labels), unseen)
