"""Data in the shape of latents, for networks of the ImageNet presets where no latents are at hand."""

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..data.dataset import Dataset


class GaussianLatents:
    """Latents of independent N(0, 1) numbers, [4, size, size], drawn anew each time.

    There is nothing to learn in them: they are for activations, memory and time.
    """

    def __init__(self, size: int, num_classes: int) -> None:
        self.shape, self.num_classes = (4, size, size), num_classes

    def __len__(self) -> int:
        return 1 << 20

    def get(self, indices: np.ndarray, generator: Generator) -> tuple[Tensor, Tensor]:
        """Latents float32 [n, 4, size, size] and labels int64 [n]."""
        labels = torch.from_numpy(np.asarray(indices, dtype=np.int64)) % self.num_classes
        return torch.randn(len(labels), *self.shape, generator=generator, dtype=torch.float32), labels


class ImageLatents:
    """Grey images as latents [4, size, size]: the image, its differences to the right and downwards, and a blurred one.

    Like latents they have redundant channels and smooth large areas; they are no latents of an autoencoder.
    """

    def __init__(self, images: Dataset, size: int) -> None:
        self._images = images
        self.shape, self.num_classes = (4, size, size), images.num_classes

    def __len__(self) -> int:
        return len(self._images)

    def get(self, indices: np.ndarray, generator: Generator) -> tuple[Tensor, Tensor]:
        """Latents float32 [n, 4, size, size] and labels int64 [n]."""
        images, labels = self._images.get(indices, generator)
        large = F.interpolate(images, self.shape[1:], mode="bilinear", align_corners=False)
        right, down = (large.roll(-1, dims) - large for dims in (3, 2))
        blurred = F.avg_pool2d(large, 3, stride=1, padding=1)
        return torch.cat([large, right, down, blurred], 1), labels
