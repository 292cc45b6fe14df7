"""The parts of a Hopper multiprocessor that a running program uses, on the CPU: copies, barriers, shared memory."""

import math
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.05
LONGEST_DELAY_SECONDS = 1e-3


class EmulationError(RuntimeError):
    """A kernel did what a GPU does not survive: a deadlock, one arrival too many, a value read in flight."""


def delay(share: float) -> None:
    """Waits a little in a share of cases, so that threads which no barrier orders meet in every order."""
    if random.random() < share:
        time.sleep(random.random() * LONGEST_DELAY_SECONDS)


class Program:
    """What the partitions of the running program share."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count
        self.failed = False
        self.atomics = threading.Lock()
        self._copies: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._copier = threading.Thread(target=self._copy, daemon=True)
        self._copier.start()

    def later(self, copy: Callable[[], None]) -> None:
        """Copies after a while, in order."""
        self._copies.put(copy)

    def end(self) -> None:
        self._copies.put(None)
        self._copier.join()

    def _copy(self) -> None:
        while (copy := self._copies.get()) is not None:
            delay(0.25)
            copy()


RUNNING: list[Program] = []


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced have landed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = self._pending = self._bytes = self._phase = 0

    def init(self, count: int) -> None:
        self._count = self._pending = count

    def arrive(self, count: int = 1, size: int = 0) -> None:
        with self._changed:
            if self._pending < count:
                raise EmulationError(f"barrier: {self._count} arrivals expected in a phase, got more")
            self._pending -= count
            self._bytes += size
            self._end_phase()

    def land(self, size: int) -> None:
        with self._changed:
            self._bytes -= size
            self._end_phase()

    def wait(self, parity: int) -> None:
        """Returns when the phase of this parity is over."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while self._phase % 2 == parity:
                if RUNNING[-1].failed:
                    raise EmulationError("another partition failed")
                if time.monotonic() > give_up:
                    state = f"{self._pending} of {self._count} arrivals and {self._bytes} bytes missing"
                    raise EmulationError(f"deadlock: waits for the end of phase {self._phase}, {state}")
                self._changed.wait(POLL_SECONDS)

    def _end_phase(self) -> None:
        if self._pending == 0 and self._bytes == 0:
            self._phase += 1
            self._pending = self._count
            self._changed.notify_all()


class Shared:
    """A tile of shared memory, or a view of one, or an array of barriers."""

    def __init__(self, data: Tensor | None, barriers: Sequence[Barrier] = ()) -> None:
        self._data, self.barriers = data, barriers

    @property
    def data(self) -> Tensor:
        assert self._data is not None
        return self._data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return [len(self.barriers), 1] if self.barriers else list(self.data.shape)

    @property
    def layout(self) -> str:
        return "layout"

    def index(self, index: int) -> "Shared":
        index = int(index)
        size = len(self.barriers) or len(self.data)
        if not 0 <= index < size:
            raise EmulationError(f"index {index} into {size} tiles or barriers")
        return Shared(None, [self.barriers[index]]) if self.barriers else Shared(self.data[index])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.data.permute(*order))

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.data.narrow(dim, start, length))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> "Shared":
        numbers = self.data.view(dtype).view(-1)
        if (count := math.prod(shape)) > len(numbers):
            raise EmulationError(f"a tile of {len(numbers)} numbers reinterpreted as one of {count}")
        return Shared(numbers[:count].view(*shape))

    reinterpret = _reinterpret  # its name from Triton 3.9 on

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        if self.data.shape != value.shape or self.dtype != value.dtype:
            raise EmulationError(f"a {value.dtype} {list(value.shape)} stored in a {self.dtype} {self.shape}")
        delay(0.5)
        self.data.copy_(value)
