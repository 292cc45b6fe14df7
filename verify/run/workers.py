"""Spreads tasks over processes: one that dies or hangs costs its own task a verdict, and no other."""

import contextlib
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from flashjvp_commands import children
from reports.environment import cores
from reports.verification import Verdict

from .judge import Run, failed, judge_all
from .plan import Task

Judge = Callable[[Any, Run], tuple[list[Any], bool]]  # rows of a task, and whether the process can take another
Lost = Callable[[Any, Run, str], list[Any]]  # rows of a task that came to no verdict, for a reason
TASK_LIMIT_S = 300.0
"""The most that a task may take: far above what any takes, also to compile on a loaded machine. What hangs is ended."""
LEAVES_S = 5.0
MEMORY_PER_PROCESS = 2 * 2**30
MOST_PROCESSES = 16
CONTEXT = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA


def count(device: str) -> int:
    """Processes that have a core and, on a GPU, memory of their own."""
    most = min(cores(), MOST_PROCESSES)
    if torch.device(device).type == "cuda":
        most = min(most, torch.cuda.mem_get_info(device)[0] // MEMORY_PER_PROCESS)
    return max(most, 1)


def without_verdict(task: Task, run: Run, reason: str) -> list[Verdict]:
    """A failing row for each backend of a task."""
    return [failed(task, run, reason, backend) for backend in task.backends]


def verdicts(
    tasks: Sequence[Any],
    run: Run,
    processes: int,
    judge: Judge = judge_all,
    limit_s: float = TASK_LIMIT_S,
    lost: Lost = without_verdict,
) -> Generator[tuple[Any, list[Any]]]:
    """Every task with its rows, as they come. `judge` is a function at the top of a module."""

    def start() -> _Worker:
        return _Worker(judge, run, limit_s, lost)

    pending = list(reversed(tasks))
    workers = [start() for _ in range(min(processes, len(pending)))]
    try:
        for worker in workers:
            worker.give(pending.pop())
        while busy := [worker for worker in workers if worker.task is not None]:
            limit = min(worker.deadline for worker in busy)
            ready = wait([worker.connection for worker in busy], timeout=max(limit - time.monotonic(), 0.0))
            for i, worker in enumerate(workers):
                task = worker.task
                if task is None or not (worker.connection in ready or time.monotonic() > worker.deadline):
                    continue
                rows, usable = worker.take()
                yield task, rows
                if pending:
                    if not usable:
                        worker.end()
                        worker = workers[i] = start()
                    worker.give(pending.pop())
    finally:
        for worker in workers:
            worker.end(leaves_s=LEAVES_S if worker.task is None else 0.0)


class _Worker:
    """One process that judges one task at a time."""

    def __init__(self, judge: Judge, run: Run, limit_s: float, lost: Lost) -> None:
        self.run, self.limit_s, self.lost = run, limit_s, lost
        self.task: Any = None
        self.deadline = 0.0
        self.connection, far = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(far, judge, run), daemon=True)
        with children.without_interrupts():
            self.process.start()
            assert self.process.pid is not None
            children.register(self.process.pid)
        far.close()

    def give(self, task: Any) -> None:
        self.task, self.deadline = task, time.monotonic() + self.limit_s
        with contextlib.suppress(BrokenPipeError):  # it has died: take() finds the end of the pipe
            self.connection.send(task)

    def take(self) -> tuple[list[Any], bool]:
        """The rows of the task it was given, and whether it can be given another."""
        task, self.task = self.task, None
        assert task is not None
        reason = f"no verdict within {self.limit_s:g} s"
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._ended()
            reason = f"its process died: {_how(self.process.exitcode)}"
        return self.lost(task, self.run, reason), False

    def end(self, leaves_s: float = 0.0) -> None:
        """Ends the process; an idle one gets `leaves_s` seconds to end what it started itself."""
        self.connection.close()
        if self.process.is_alive():
            self.process.join(leaves_s)
        if self.process.is_alive() and self.process.pid is not None:
            children.end(self.process.pid)
        self._ended()

    def _ended(self) -> None:
        self.process.join()
        if self.process.pid is not None:
            children.forget(self.process.pid)


def _how(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


def _serve(connection: Connection, judge: Judge, run: Run) -> None:
    os.setsid()  # Ctrl-C is the parent's to handle, and what this process starts ends with it
    torch.set_num_threads(1)
    # The interpreter computes with NumPy, which warns where a GPU gives inf or NaN in silence; the results are judged.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(judge(task, run))
