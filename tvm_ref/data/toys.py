"""Two-dimensional toy distributions: eight Gaussians, two moons, a checkerboard. Nearly all points lie in [-3, 3]^2."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

ToyName = Literal["eight_gaussians", "moons", "checkerboard"]

RADIUS = 2.0  # of the circle of eight Gaussians
DEVIATION = 0.2  # of each of them
MOON_NOISE = 0.05
TRAINING_POINTS = 2**18
TRAINING_SEED = 0


def toy_points(name: ToyName, count: int, seed: int) -> np.ndarray:
    """Draws `count` independent points, float32 [count, 2]. Equal arguments give equal points.

    eight_gaussians: N(c_k, 0.2^2 I) with equal weights, c_k evenly spaced on the circle of radius 2.
    moons: scikit-learn's two half circles with noise 0.05, centred and scaled by 1.5.
    checkerboard: uniform on every other square of the 4 x 4 board [-2, 2]^2.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"expected count >= 1 and seed >= 0, got count {count} and seed {seed}")
    random = np.random.default_rng([seed])
    if name == "eight_gaussians":
        angle = random.integers(8, size=count) * (np.pi / 4)
        centre = RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        points = centre + DEVIATION * random.standard_normal((count, 2))
    elif name == "moons":
        points = _moons(count, int(random.integers(2**32)))
    elif name == "checkerboard":
        column = random.integers(4, size=count)
        row = 2 * random.integers(2, size=count) + column % 2
        points = np.stack([column, row], axis=1) + random.random((count, 2)) - 2.0
    else:
        raise ValueError(f"expected eight_gaussians, moons or checkerboard, got {name!r}")
    return points.astype(np.float32)


def nearest_gaussian(points: Tensor) -> Tensor:
    """Which of the eight Gaussians has its centre nearest to each of the points [n, 2]: int64 [n], 0 to 7."""
    angle = torch.atan2(points[:, 1], points[:, 0]) * (4 / math.pi)
    return angle.round().long() % 8


def _moons(count: int, seed: int) -> np.ndarray:
    from sklearn.datasets import make_moons  # slow to import

    points, _ = make_moons(count, noise=MOON_NOISE, random_state=seed)  # centred at (0.5, 0.25)
    return 1.5 * (points - np.array([0.5, 0.25]))


class Toy:
    """The training set of a toy distribution: 2^18 points, the same in every run. Shape (2, 1, 1), no labels.

    For fresh points to evaluate with, call `toy_points` with another seed.
    """

    shape = (2, 1, 1)
    num_classes = 0

    def __init__(self, name: ToyName) -> None:
        self._points = torch.from_numpy(toy_points(name, TRAINING_POINTS, TRAINING_SEED))

    def __len__(self) -> int:
        return len(self._points)

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns points float32 [n, 2, 1, 1] and labels int64 [n], all zero."""
        return self._points[torch.from_numpy(indices)][:, :, None, None], torch.zeros(len(indices), dtype=torch.int64)
