"""Saves the checkpoints of a run: at once, or in a thread while training goes on (run.async_checkpoints)."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from . import checkpoint
from .checkpoint import CheckpointError, Tensors
from .config import TrainConfig
from .parallel import World
from .step import NonFiniteError


class Saver:
    """Saves checkpoints of one run. Every process has one, and calls it at the same steps.

    saved: the newest checkpoint that is complete, None before the first.
    """

    def __init__(self, folder: Path, config: TrainConfig, world: World, data: Any) -> None:
        self._folder, self._config, self._world, self._data = folder, config, world, data
        self._thread = _Thread(world) if config.run.async_checkpoints else None
        self.saved: Path | None = None

    @property
    def failed(self) -> bool:
        """Whether the thread of this process could not write a checkpoint. Never waits."""
        return self._thread is not None and self._thread.failed

    def save(self, step: int, tensors: Tensors, observed: Any, *, last: bool) -> None:
        """Saves a checkpoint. In a thread it is written from a copy, so `tensors` may change afterwards.

        last: whether the run ends here; the checkpoint is then complete when this returns. Raises NonFiniteError for
        weights that are not finite, and CheckpointError for what could not be written, now or by the thread; in the
        latter case the present state is saved first.
        """
        if bad := [name for part in self._world.gather(_not_finite(tensors)) for name in part]:
            self.wait()
            where = f"the last good ones are in {self.saved}" if self.saved else "no good ones were saved"
            raise NonFiniteError(f"the weights after step {step} are not finite (first {bad[0]}); {where}")
        notes = {checkpoint.DATA: self._data, checkpoint.OBSERVED: observed}
        write = partial(checkpoint.save, self._folder, step, config=self._config, notes=notes)
        error = self.wait()
        if error is not None or self._thread is None or last:
            self.saved = write(tensors=tensors, world=self._world)
        else:
            self._thread.start(tensors, lambda copies, world: write(tensors=copies, world=world))
        if error is not None:
            raise CheckpointError(f"{error} What was trained until step {step} is saved in {self.saved}.") from error

    def wait(self) -> CheckpointError | None:
        """Waits for the thread, and returns why its checkpoint could not be written, if so."""
        if self._thread is None:
            return None
        try:
            self.saved = self._thread.result() or self.saved
        except CheckpointError as error:
            return error
        return None

    def close(self) -> None:
        """Waits for the thread and ends it."""
        if self._thread is not None:
            self._thread.close()


class _Thread:
    """Writes one checkpoint at a time, from copies in host memory, which are kept for the next one."""

    def __init__(self, world: World) -> None:
        self._world = world.in_host_memory()
        self._mesh = DeviceMesh.from_group(self._world.group, "cpu") if world.size > 1 else None
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._work: Future[Path] | None = None
        self._copies: Tensors = {}

    @property
    def failed(self) -> bool:
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def start(self, tensors: Tensors, write: Callable[[Tensors, World], Path]) -> None:
        mine = _mine(tensors, self._world)
        for name in mine:
            self._copy(name, tensors[name])
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._work = self._pool.submit(write, {name: self._copies[name] for name in mine}, self._world)

    def result(self) -> Path | None:
        work, self._work = self._work, None
        return None if work is None else work.result()

    def close(self) -> None:
        self._pool.shutdown()

    def _copy(self, name: str, value: torch.Tensor) -> None:
        part = value.to_local() if isinstance(value, DTensor) else value
        kept = self._copies.get(name)
        room = kept.to_local() if isinstance(kept, DTensor) else kept
        if room is None:
            room = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._copies[name] = room
            if isinstance(value, DTensor):
                assert self._mesh is not None
                self._copies[name] = DTensor.from_local(
                    room, self._mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
                )
        room.copy_(part.detach(), non_blocking=True)


def _mine(tensors: Tensors, world: World) -> list[str]:
    """The tensors that this process copies: those of which it has a shard, and its share of those that all have."""
    whole = sorted(
        (name for name, x in tensors.items() if not isinstance(x, DTensor)),
        key=lambda name: (-tensors[name].numel(), name),
    )
    share = set(whole[world.rank :: world.size])
    return [name for name, x in tensors.items() if isinstance(x, DTensor) or name in share]


def _not_finite(tensors: Tensors) -> list[str]:
    """Names the tensors of this process that hold NaN or infinity, with one wait for the device."""
    local = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in tensors.items()}
    named = [(name, x) for name, x in local.items() if x.is_floating_point()]
    finite = torch.stack([x.isfinite().all() for _, x in named])
    return [name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good]
