"""Prepares the batch of each step: images, noise, times, guidance and label dropout.

All of it depends only on (seed, step, position in the global batch), not on how the batch is split.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Generator, Tensor

from ..data.archive import DatasetError
from ..data.dataset import BatchOrder, Dataset
from ..objective.loss import Batch, make_batch
from .config import ConfigError, TrainConfig
from .parallel import World

UNIT = 16  # images that share one random generator; units start at multiples of UNIT in the global batch
DATA, DRAW, FLIP = 0, 1, 2  # independent random streams


class Steps:
    """The batches of one step after the other. A thread prepares the next one while the present one is computed."""

    def __init__(self, draw: Callable[[int], list[Batch]], first: int) -> None:
        self._draw, self._next = draw, first
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._ahead: Future[list[Batch]] = self._pool.submit(draw, first)

    def error(self) -> DatasetError | None:
        """Waits for the next batches; returns why they cannot be had, None if they can."""
        error = self._ahead.exception()
        if error is not None and not isinstance(error, DatasetError):
            raise error
        return error

    def take(self) -> list[Batch]:
        """Returns the next batches. Raises DatasetError for an item that cannot be read."""
        batches = self._ahead.result()
        self._next += 1
        self._ahead = self._pool.submit(self._draw, self._next)
        return batches

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)


class Batches:
    """Gives this process its part of every global batch, in micro-batches.

    The global batch of a step does not depend on the number of processes or micro-batches. It has a contiguous part for
    each process, or for each run.context_parallel processes that share the tokens of an image.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, world: World) -> None:
        """Raises ConfigError if the data do not match the network, or the batch cannot be split evenly."""
        self._config, self._dataset, self._world = config, dataset, world
        model, run = config.model, config.run
        wanted = (model.channels, model.image_size, model.image_size)
        if tuple(dataset.shape) != wanted:
            raise ConfigError(
                f"the data are images of shape {tuple(dataset.shape)} (channels, height, width), but the network "
                f"takes {wanted}: change --model.channels and --model.image-size, or the data"
            )
        if dataset.num_classes != model.num_classes:
            raise ConfigError(
                f"the data have {dataset.num_classes} classes, but the network has {model.num_classes}: "
                f"give --model.num-classes {dataset.num_classes}, or other data"
            )
        shared_by = run.context_parallel
        if world.size % shared_by:
            raise ConfigError(
                f"run.context_parallel: expected a divisor of the {world.size} processes of the run, got {shared_by}"
            )
        parts = world.size // shared_by * run.accumulate
        if run.batch % parts:
            groups = f"{world.size} processes" + f", {shared_by} for each image," * (shared_by > 1)
            raise ConfigError(
                f"run.batch = {run.batch} cannot be split evenly over {groups} with "
                f"{run.accumulate} micro-batches each: give a --run.batch that is a multiple of {parts}"
            )
        self._order = BatchOrder(seed=run.seed, size=len(dataset))
        self._micro = run.batch // parts

    def steps(self, first: int) -> "Steps":
        """Prepares the micro-batches of step `first` and all following ones, on the CPU (pinned for a GPU)."""
        return Steps(self.draw, first)

    def draw(self, step: int) -> list[Batch]:
        """Prepares the micro-batches of a step."""
        accumulate = self._config.run.accumulate
        start = self._world.rank // self._config.run.context_parallel * accumulate * self._micro
        batches = [self._part(step, start + i * self._micro) for i in range(accumulate)]
        if self._world.device.type == "cuda":
            batches = [Batch(*(field.pin_memory() for field in batch)) for batch in batches]
        return batches

    def _part(self, step: int, start: int) -> Batch:
        """Prepares images [start, start + micro) of the global batch of a step."""
        run = self._config.run
        stop = start + self._micro
        indices = self._order.indices(step, 0, 1, run.batch)[start:stop]
        x0, labels = self._dataset.get(indices, _generator(run.seed, step, DATA, 0))
        if self._config.data.flip:
            x0 = mirrored(x0, run.seed, step, range(start, stop))
        first, last = start // UNIT, -(-stop // UNIT)
        # A unit that this part covers only partly is padded with images of zeros, drawn whole, and then cut.
        x0 = _pad(x0.to(torch.get_default_dtype()), start - first * UNIT, last * UNIT - stop)
        labels = _pad(labels, start - first * UNIT, last * UNIT - stop)
        units = [
            self._unit(x0[i * UNIT : (i + 1) * UNIT], labels[i * UNIT : (i + 1) * UNIT], step, first + i)
            for i in range(last - first)
        ]
        here = slice(start - first * UNIT, stop - first * UNIT)
        return Batch(*(torch.cat(fields)[here] for fields in zip(*units, strict=True)))

    def _unit(self, x0: Tensor, labels: Tensor, step: int, unit: int) -> Batch:
        config = self._config
        generator = _generator(config.run.seed, step, DRAW, unit)
        return make_batch(x0, labels, config.loss, config.times, config.model.num_classes, generator)


def mirrored(x0: Tensor, seed: int, step: int, positions: range) -> Tensor:
    """Mirrors some of x0 [n, C, H, W] from left to right, each with probability 1/2.

    Which ones depends only on seed, step and position in the global batch. A latent that was sampled from mean and
    deviation is mirrored as if both had been.
    """
    coins = torch.rand(positions.stop, generator=_generator(seed, step, FLIP)) < 0.5
    return torch.where(coins[positions.start :, None, None, None], x0.flip(-1), x0)


def _generator(*key: int) -> Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(seed) >> 1)


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    """Adds rows of zeros before and after `x`."""
    if not before and not after:
        return x
    return torch.cat([x.new_zeros(before, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])])
