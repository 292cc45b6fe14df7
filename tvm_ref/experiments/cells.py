"""What an experiment is made of: cells, one for each variant and seed, that can be run in any order and kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from matplotlib.figure import Figure

from ..training.parallel import World
from .results import Row

# quick: whether it works at all; small: minutes on a CPU; full: what claims are made of, on a GPU.
Scale = Literal["quick", "small", "full"]
SCALES = get_args(Scale)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where an experiment runs: its scale, device, folder, and local files.

    data_path: the folder of Fashion-MNIST's files, "" for none. imagenet_classifier: a file that images are judged by,
    too.
    """

    scale: Scale
    world: World
    folder: Path
    data_path: str
    imagenet_classifier: Path | None = None

    def pick(self, *, quick: Any, small: Any, full: Any) -> Any:
        """The value for this scale."""
        return {"quick": quick, "small": small, "full": full}[self.scale]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The work for one variant and seed.

    settings: what the rows depend on, as in a JSON file. work: gives the rows; its argument is a folder of its own,
    where it finds what it left when it was stopped.
    """

    variant: str
    seed: int
    settings: Mapping[str, Any]
    work: Callable[[Path], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, the cells that answer it, and the figure that shows the answer."""

    name: str
    question: str
    cells: Callable[[Setting], list[Cell]]
    draw: Callable[[pd.DataFrame], Figure]
