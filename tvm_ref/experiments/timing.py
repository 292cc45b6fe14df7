"""How long a training step of each variant takes, so that all can be given the same time."""

import json
import time
from collections.abc import Mapping
from typing import Any

import torch

from ..data.dataset import open_dataset
from ..data.untrusted import read_settings
from ..training.batches import Batches
from ..training.config import TrainConfig
from ..training.files import write_atomically
from ..training.state import State
from ..training.step import gradient
from .cells import Setting
from .training import with_settings

WARM_UP, ROUNDS = 4, 8


def seconds_per_step(
    base: TrainConfig, variants: Mapping[str, Mapping[str, Any]], setting: Setting, name: str
) -> dict[str, float]:
    """The least time of a step of each variant, in seconds, of some rounds over all variants: on a CPU, of the
    processor, so that other work on the machine does not count.

    It is kept in the folder: an experiment that goes on has the times that it began with.
    """
    path = setting.folder / "cells" / name / "seconds-per-step.json"
    if path.exists():
        found = read_settings(path)
        if isinstance(found, dict) and found.keys() == variants.keys():
            return {variant: float(value) for variant, value in found.items()}
    least = _measured(base, variants, setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda draft: draft.write_text(json.dumps(least, indent=1) + "\n"))
    return least


def _measured(base: TrainConfig, variants: Mapping[str, Mapping[str, Any]], setting: Setting) -> dict[str, float]:
    device = setting.world.device
    dataset = open_dataset(base.data)
    least = dict.fromkeys(variants, float("inf"))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    ready: dict[str, tuple[State, list[Any]]] = {}

    def step(variant: str) -> None:
        state, batches = ready[variant]
        gradient(state.objective, state.target, batches, setting.world, captured=state.captured)  # waits for the device
        state.advance()

    for variant, changes in variants.items():
        torch.compiler.reset()  # variants share the function that is compiled, which has few versions at a time
        config = with_settings(base, changes)
        draws = Batches(config, dataset, setting.world).draw(0)
        moved = [type(batch)(*(field.to(device) for field in batch)) for batch in draws]
        ready[variant] = (State(config, setting.world), moved)
        for _ in range(WARM_UP):  # the last one has a CUDA graph, which needs no compiled function
            step(variant)
    for _ in range(ROUNDS):
        for variant in variants:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = clock()
            step(variant)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            least[variant] = min(least[variant], clock() - began)
    return least
