"""Traces chosen steps of a run: torch.profiler (run.profile) and a record of GPU allocations (run.memory_snapshot).

The first process writes profile/steps-3-5.json, for <https://ui.perfetto.dev> or chrome://tracing, and
profile/memory-step-4.pickle, for <https://pytorch.org/memory_viz>.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .config import RunConfig
from .files import write_atomically

FOLDER = "profile"
MOST_EVENTS = 200_000  # allocations that are kept


class Tracing:
    """Is told of every step. Left before its steps have come, it writes nothing."""

    def __init__(self, run: RunConfig, say: Callable[[str], None]) -> None:
        self._run, self._say, self._folder = run, say, Path(run.out) / FOLDER
        self._open = contextlib.ExitStack()
        self._profile: profile | None = None

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops what is being traced."""
        self._open.close()

    def before(self, step: int) -> None:
        """Before step `step`, counted from 1."""
        if self._run.profile is not None and step == self._run.profile[0]:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_initialized()
            self._profile = self._open.enter_context(profile(activities=kinds, record_shapes=True, acc_events=True))
        if step == self._run.memory_snapshot and (memory := self._memory()) is not None:
            memory._record_memory_history(max_entries=MOST_EVENTS)
            self._open.callback(memory._record_memory_history, enabled=None)

    def after(self, step: int) -> None:
        """After step `step`."""
        if step == self._run.memory_snapshot and (memory := self._memory(quiet=True)) is not None:
            self._write(f"memory-step-{step}.pickle", lambda draft: memory._dump_snapshot(str(draft)))
            memory._record_memory_history(enabled=None)
        if self._profile is not None and self._run.profile is not None and step == self._run.profile[1]:
            traced, self._profile = self._profile, None
            self._open.close()
            self._write(
                f"steps-{self._run.profile[0]}-{step}.json", lambda draft: traced.export_chrome_trace(str(draft))
            )

    def _memory(self, *, quiet: bool = False) -> Any:
        """The module that records allocations, or None where there is none; then it says so."""
        memory = torch.cuda.memory
        there = all(hasattr(memory, name) for name in ("_record_memory_history", "_dump_snapshot"))
        if torch.cuda.is_initialized() and there:
            return memory
        if not quiet:
            why = "this PyTorch has no record of allocations" if torch.cuda.is_initialized() else "there is no GPU"
            self._say(f"run.memory_snapshot: nothing is recorded, since {why}")
        return None

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        self._folder.mkdir(exist_ok=True)
        write_atomically(self._folder / name, write)
        self._say(f"written: {self._folder / name}")
