"""Squares: sets of four points in the plane, one point a token, so that attention has something to attend to."""

import numpy as np
import torch
from torch import Tensor

CENTRE = 0.5  # standard deviation of each coordinate of the centre
RADII = (0.7, 1.4)  # distance of the corners from the centre
NOISE = 0.05  # standard deviation of each coordinate of a corner
TRAINING_SETS = 2**17
TRAINING_SEED = 0


def squares(count: int, seed: int) -> np.ndarray:
    """Draws the corners of `count` independent squares, float32 [count, 4, 2]. Equal arguments give equal squares.

    Corner k is c + r (cos, sin)(a + k pi / 2) + noise: c ~ N(0, 0.5^2 I), r one of 0.7 and 1.4, a uniform in [0, 2 pi),
    noise N(0, 0.05^2 I). Raises ValueError for count < 1 or seed < 0.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"expected count >= 1 and seed >= 0, got count {count} and seed {seed}")
    random = np.random.default_rng([seed])
    centre = CENTRE * random.standard_normal((count, 1, 2))
    radius = np.array(RADII)[random.integers(2, size=(count, 1, 1))]
    angle = 2 * np.pi * random.random((count, 1)) + np.arange(4) * (np.pi / 2)
    corners = centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return (corners + NOISE * random.standard_normal((count, 4, 2))).astype(np.float32)


def misfit(sets: Tensor) -> float:
    """How far sets of four points [n, 4, 2] are from being squares: the RMS distance of a point from the corner of the
    square, of any size, place and angle, that fits its set best. 0.05, the noise, for the data.

    With points as complex numbers, a set is a square where its discrete Fourier transform has modes 0 and 1 alone.
    """
    points = torch.view_as_complex(sets.double().contiguous())
    modes = torch.fft.fft(points, dim=1, norm="ortho")
    return float((modes[:, 2:].abs().square().sum(1) / 4).mean().sqrt())


class Squares:
    """The training set: 2^17 squares, the same in every run. Shape (2, 2, 2): the corners row by row. No labels."""

    shape = (2, 2, 2)
    num_classes = 0

    def __init__(self) -> None:
        self._sets = as_images(squares(TRAINING_SETS, TRAINING_SEED))

    def __len__(self) -> int:
        return len(self._sets)

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns sets float32 [n, 2, 2, 2] and labels int64 [n], all zero."""
        return self._sets[torch.from_numpy(indices)], torch.zeros(len(indices), dtype=torch.int64)


def as_images(sets: np.ndarray) -> Tensor:
    """Sets [n, 4, 2] as images [n, 2, 2, 2], whose channels are the coordinates."""
    return torch.from_numpy(sets).transpose(1, 2).reshape(-1, 2, 2, 2).contiguous()


def as_sets(images: Tensor) -> Tensor:
    """The inverse of `as_images`."""
    return images.flatten(2).transpose(1, 2)
