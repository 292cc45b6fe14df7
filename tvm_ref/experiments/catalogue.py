"""The experiments by name, in the order of docs/experiments.md."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cells import Experiment

NAMES = (
    "objectives", "times", "target", "lipschitz", "guidance", "bound", "cycle", "precision", "fast_step", "nfe",
    "memory",
)  # fmt: skip


def experiment(name: str) -> "Experiment":
    """The experiment in the module of this name."""
    found: Experiment = importlib.import_module(f".{name}", __package__).EXPERIMENT
    return found
