"""A data set that goes on past a limited number of bad items."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .archive import DatasetError
from .dataset import Dataset


class Tolerant:
    """A data set whose bad items are skipped: the next good item, in the order of numbers, stands in for each.

    Which item stands in depends on the files alone, so a resumed run draws the same batches.
    """

    def __init__(self, dataset: Dataset, max_bad: int, say: Callable[[str], None]) -> None:
        """max_bad: how many bad items may be skipped; one more is an error. say: is told of each bad item once."""
        self._dataset, self._max_bad, self._say = dataset, max_bad, say
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._dataset.shape

    @property
    def num_classes(self) -> int:
        return self._dataset.num_classes

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """As Dataset.get. Raises DatasetError for the first bad item beyond `max_bad`."""
        before = draw.get_state()
        while True:
            here = np.array([self._instead_of(int(index)) for index in indices], dtype=np.int64)
            try:
                return self._dataset.get(here, draw)
            except DatasetError:
                draw.set_state(before)
                if not any([self._is_bad(int(index)) for index in np.unique(here)]):
                    raise

    def _instead_of(self, index: int) -> int:
        start = index
        while index in self.bad:
            index = (index + 1) % len(self)
            if index == start:
                raise DatasetError(f"no good item is left; the first bad one: {self.bad[start]}")
        return index

    def _is_bad(self, index: int) -> bool:
        """Reads one item alone, and notes it if that fails."""
        try:
            self._dataset.get(np.array([index], dtype=np.int64), torch.Generator())
        except DatasetError as error:
            if len(self.bad) >= self._max_bad:
                limit = f"more than data.max_bad = {self._max_bad} bad items"
                raise DatasetError(f"{error} ({limit})" if self._max_bad else str(error)) from error
            self.bad[index] = str(error)
            self._say(f"skipped bad item {len(self.bad)} of at most {self._max_bad}: {error}")
            return True
        return False
