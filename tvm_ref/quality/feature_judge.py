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
from ..sampling.grids import to_uint8
from .classifier import DIGITS, FASHION, train_classifier
from .imagenet_classifier import ImageNetClassifier
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


class Distances(NamedTuple):
    """Figures of features of samples beside those of real images, as in `FeatureQuality`."""

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
        real = _real(data)
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
        chosen = self._features[_drawn(len(self._features), count, seed)]
        return self._figures(chosen, self.held_out_accuracy)

    def _figures(self, features: Tensor, accuracy: float) -> FeatureQuality:
        return FeatureQuality(accuracy, *_distances(features, self._features))


class ImageNetJudge:
    """Compares samples with the same real images by the features of a classifier of ImageNet. They are no FID."""

    def __init__(self, data: DataConfig, classifier: Path, device: torch.device) -> None:
        """Raises as `ImageNetClassifier` and `open_dataset`. A CPU takes minutes for the images of Fashion-MNIST."""
        self._network = ImageNetClassifier(classifier, device)
        self._features = self._of(_real(data).compared)

    def judge(self, samples: Tensor) -> Distances:
        """Judges `samples` [n, 1, H, W], scale [-1, 1]; at least six."""
        return _distances(self._of(samples), self._features)

    def bootstrap(self, count: int, seed: int) -> Distances:
        """What `count` real images get, the same as `FeatureJudge.bootstrap` draws."""
        return _distances(self._features[_drawn(len(self._features), count, seed)], self._features)

    def _of(self, images: Tensor) -> Tensor:
        return self._network.features(to_uint8(images).expand(-1, 3, -1, -1))


@lru_cache(maxsize=2)
def imagenet_judge(data: DataConfig, classifier: Path, device: torch.device) -> ImageNetJudge:
    """The judge of a data set by a file; features of the real images are computed once in a process."""
    return ImageNetJudge(data, classifier, device)


def _distances(features: Tensor, real: Tensor) -> Distances:
    covered = precision_recall(features, real)
    return Distances(frechet_distance(features, real), *covered, coverage(features, real))


def _drawn(of: int, count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed]).integers(of, size=count))


@lru_cache(maxsize=2)
def feature_judge(data: DataConfig, device: torch.device) -> FeatureJudge:
    """The judge of a data set; its classifier is trained once in a process."""
    return FeatureJudge(data, device)


def _real(data: DataConfig) -> RealImages:
    if data.name not in ("digits", "fashion"):
        raise ValueError(f"data: expected digits or fashion, got {data.name!r}")
    return _digits() if data.name == "digits" else _fashion(Path(data.path))


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
