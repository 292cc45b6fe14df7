"""Which data a run trains on, and in which order: DataConfig, open_dataset, BatchOrder.

Every source has a fixed number of items, numbered from 0, and no state: what item i is follows from i (and, for
latents, from the generator that the caller passes). Images are float32 [C, H, W] in [-1, 1].
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from .archive import ImageArchive, LatentArchive
from .digits import Digits
from .latents import LATENT_STATISTICS, LatentStatisticsName
from .toys import Toy, ToyName

DataName = Literal["eight_gaussians", "moons", "checkerboard", "digits", "archive"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from.

    Raises:
        ValueError: for a combination that has no meaning.
    """

    name: DataName = "digits"  # 2-D points, the digits that scikit-learn ships, or an archive of images or latents
    path: str = ""  # of the archive, an uncompressed zip file or a folder; for "archive" only
    latents: LatentStatisticsName | None = None  # constants that normalise an archive of latents; None: RGB images
    num_classes: int = 0  # of an archive, whose labels must be less; 0: no labels are read. Others know theirs

    def __post_init__(self) -> None:
        if self.name not in get_args(DataName):
            raise ValueError(f"data name must be one of {', '.join(get_args(DataName))}, got {self.name!r}")
        if self.latents is not None and self.latents not in LATENT_STATISTICS:
            raise ValueError(f"latents must be None or one of {', '.join(LATENT_STATISTICS)}, got {self.latents!r}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {self.num_classes}")
        if self.name == "archive" and not self.path:
            raise ValueError("data 'archive' needs a path to a zip file or a folder, got none")
        if self.name != "archive" and (self.path or self.latents is not None or self.num_classes):
            raise ValueError(f"path, latents and num_classes belong to data 'archive', not to {self.name!r}")


class Dataset(Protocol):
    """Numbered items of one shape."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an item."""

    @property
    def num_classes(self) -> int:
        """Labels lie in [0, num_classes); 0 if there are none (then `get` gives zeros)."""

    def __len__(self) -> int:
        """The number of items."""

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Items float32 [n, C, H, W] and labels int64 [n] at `indices` [n], on the CPU.

        Latents are redrawn at each access: `draw` (CPU) gives one number, and the noise of an item is a function of
        that number and of the item's index. So ranks whose generators are in the same state draw the same noise for
        the same item, however the batch is split. Other sources leave `draw` alone.
        """


def open_dataset(config: DataConfig) -> Dataset:
    """The dataset that `config` describes; an archive is checked as far as its listing, labels and first item go.

    Raises DatasetError (a ValueError) that names the bad file, and FileNotFoundError for a missing archive.
    """
    if config.name == "archive":
        path = Path(config.path)
        if config.latents is None:
            return ImageArchive(path, config.num_classes)
        return LatentArchive(path, config.num_classes, config.latents)
    if config.name == "digits":
        return Digits()
    name: ToyName = config.name
    return Toy(name)


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which items a rank sees in a step: a pure function of (seed, step, rank).

    Epoch e goes through all `size` items in a permutation drawn from (seed, e). The global batch of step i is places
    [i G, (i + 1) G) of these permutations in a row, G = world_size * local_batch, and may cross epochs; ranks take
    contiguous parts of it. So the global batch does not depend on the world size, and a run resumes at any step.
    """

    seed: int
    size: int

    def __post_init__(self) -> None:
        if self.seed < 0 or self.size < 1:
            raise ValueError(f"an order needs seed >= 0 and size >= 1, got seed {self.seed} and size {self.size}")

    def indices(self, step: int, rank: int, world_size: int, local_batch: int) -> np.ndarray:
        """The items, int64 [local_batch], of `rank` in [0, world_size) in `step` >= 0. Raises ValueError outside."""
        if step < 0 or local_batch < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "expected step >= 0, 0 <= rank < world_size and local_batch >= 1, got "
                f"step {step}, rank {rank}, world_size {world_size}, local_batch {local_batch}"
            )
        first = (step * world_size + rank) * local_batch
        epochs, places = np.divmod(np.arange(first, first + local_batch), self.size)
        indices = np.empty(local_batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.seed, int(epoch), self.size)[places[here]]
        return indices


@lru_cache(maxsize=2)  # a batch lies in one epoch or two; a permutation of ImageNet takes as long as reading the batch
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(size)
    order.setflags(write=False)
    return order
