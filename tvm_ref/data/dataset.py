"""The data set of a run and the order in which it is visited: `DataConfig`, `open_dataset` and `BatchOrder`.

Every data set has a fixed number of items, numbered from 0, and no state: item i depends on i only (for latents, also
on the generator that the caller passes). Images are float32 [C, H, W] in [-1, 1].
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
from .fashion import Fashion
from .latents import LATENT_STATISTICS, LatentStatisticsName
from .point_sets import Squares
from .toys import Toy, ToyName

DataName = Literal["eight_gaussians", "moons", "checkerboard", "squares", "digits", "fashion", "archive"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set to train on.

    Raises:
        ValueError: for unknown names and for settings that do not belong together.
    """

    name: DataName = "digits"  # 2-D points, squares of four points, scikit-learn's handwritten digits, Fashion-MNIST,
    # or an archive of images or latents
    path: str = ""  # archive: an uncompressed zip file or a folder; fashion: the folder with its four .gz files
    latents: LatentStatisticsName | None = None  # archive only: how latents are normalised; None: RGB images
    num_classes: int = 0  # archive only: labels lie in [0, num_classes); 0: labels are not read
    flip: bool = False  # archive only: mirror each image or latent from left to right with probability 1/2
    max_bad: int = 0  # archive only: bad items that each process skips, naming them, before it stops

    def __post_init__(self) -> None:
        if self.name not in get_args(DataName):
            raise ValueError(f"data name must be one of {', '.join(get_args(DataName))}, got {self.name!r}")
        if self.latents is not None and self.latents not in LATENT_STATISTICS:
            raise ValueError(f"latents must be None or one of {', '.join(LATENT_STATISTICS)}, got {self.latents!r}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {self.num_classes}")
        if self.max_bad < 0:
            raise ValueError(f"max_bad must not be negative, got {self.max_bad}")
        if self.name == "archive" and not self.path:
            raise ValueError("data 'archive' needs a path to a zip file or a folder, got none")
        if self.path and self.name not in ("archive", "fashion"):
            raise ValueError(f"path belongs to data 'archive' and 'fashion', not to {self.name!r}")
        only = ("latents", "num_classes", "max_bad", "flip")
        if self.name != "archive" and any(getattr(self, name) not in (None, 0) for name in only):
            raise ValueError(f"{', '.join(only[:-1])} and flip belong to data 'archive', not to {self.name!r}")


class Dataset(Protocol):
    """A map-style data set: numbered items of one shape."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an item."""

    @property
    def num_classes(self) -> int:
        """Labels lie in [0, num_classes). 0 means no labels; then `get` returns zeros."""

    def __len__(self) -> int:
        """The number of items."""

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns items float32 [n, C, H, W] and labels int64 [n] at `indices` [n], on the CPU.

        Latents are sampled anew at each access: `draw` (a CPU generator) gives one number, and the noise of an item
        depends only on that number and the item's index. So ranks whose generators are in the same state draw the same
        noise for the same item, however the batch is split. Other data sets do not use `draw`.
        """


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the data set that `config` describes. Of an archive, the listing, the labels and the first good item are
    checked.

    Raises DatasetError (a ValueError) that names the bad file, and FileNotFoundError for missing files.
    """
    if config.name == "archive":
        path = Path(config.path)
        if config.latents is None:
            return ImageArchive(path, config.num_classes, config.max_bad)
        return LatentArchive(path, config.num_classes, config.latents, config.max_bad)
    if config.name == "digits":
        return Digits()
    if config.name == "squares":
        return Squares()
    if config.name == "fashion":
        return Fashion(Path(config.path))
    name: ToyName = config.name
    return Toy(name)


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """The items that each rank gets in each step: a stateless distributed sampler, a function of (seed, step, rank).

    Epoch e visits all `size` items in a permutation drawn from (seed, e). With the permutations of all epochs
    concatenated, the global batch of step i is positions [i G, (i + 1) G), G = world_size * local_batch; it may cross
    epochs. Each rank takes a contiguous part. So the global batch does not depend on the world size, and a run can
    resume at any step.
    """

    seed: int
    size: int

    def __post_init__(self) -> None:
        if self.seed < 0 or self.size < 1:
            raise ValueError(f"an order needs seed >= 0 and size >= 1, got seed {self.seed} and size {self.size}")

    def indices(self, step: int, rank: int, world_size: int, local_batch: int) -> np.ndarray:
        """Returns the items, int64 [local_batch], of `rank` in [0, world_size) in `step` >= 0; ValueError otherwise."""
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


@lru_cache(maxsize=2)  # a batch spans at most two epochs; permuting ImageNet takes as long as reading a batch
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(size)
    order.setflags(write=False)
    return order
