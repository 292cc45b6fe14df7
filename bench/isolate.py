"""Child processes: workers may crash, hang or be killed, and each cell still gets an outcome."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import IO, Any

from flashjvp_commands import children
from reports.environment import ROOT

from .environment import available_memory_mib

WORKER = (sys.executable, "-m", "bench.worker")
MEMORY_SHARE = 0.8
POLL_S = 0.5
ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # torch.compile would start as many processes as there are cores

Event = dict[str, Any]


class WorkerError(RuntimeError):
    """The worker could not even describe the environment."""


def environments(
    device: str | None, dtypes: dict[str, list[str]], limit_s: float, worker: tuple[str, ...] = WORKER
) -> list[Event]:
    """The environment columns for each dtype, which are by kind of device; measured in a child so that the parent never
    touches the device."""
    with _Child(worker) as child:
        child.give({"device": device, "dtypes": dtypes, "cells": []})
        event = child.next_event(limit_s)
        if event is None:
            raise WorkerError(child.why_it_ended())
    if event["event"] == "timeout":
        raise WorkerError(f"no answer within {limit_s:g} s")
    return list(event["found"])


def outcomes(
    cells: list[Event],
    device: str,
    limit_s: float,
    on_start: Callable[[Event], None],
    worker: "tuple[str, ...] | Spare" = WORKER,
) -> Generator[tuple[Event, Event]]:
    """Yields (cell, outcome) for every cell, whatever its process does.

    The cells share a process as long as it lives; after a crash, a hang of more than `limit_s` seconds in one cell,
    or an error, the rest continue in a fresh one. Every process that is started settles at least one cell, so this
    ends.
    """
    pending = list(cells)
    while pending:
        settled = started = False
        task = {"device": device, "cells": pending, "memory_limit_mib": _memory_limit_mib(device)}
        with worker.take() if isinstance(worker, Spare) else _Child(worker) as child:
            child.give(task)
            while pending:
                event = child.next_event(limit_s)
                if event is None:
                    if started or not settled:
                        yield pending.pop(0), {"status": "crashed", "reason": child.why_it_ended()}
                    break
                if event["event"] == "start":
                    started = True
                    on_start(pending[0])
                elif event["event"] == "outcome":
                    settled, started = True, False
                    yield pending.pop(0), {k: v for k, v in event.items() if k not in ("event", "id")}
                else:
                    yield pending.pop(0), {"status": "timeout", "reason": f"no result within {limit_s:g} s"}
                    break


def side_by_side(parts: Sequence[list[Event]], device: str, limit_s: float, worker: tuple[str, ...] = WORKER) -> None:
    """Calls the cells of each part once, in a process a part, all at the same time, to fill the compilers' caches.

    Nothing that happens to them matters. After `limit_s` seconds all processes are killed.
    """
    end, stopped = time.monotonic() + limit_s, threading.Event()

    def serve(cells: list[Event]) -> None:
        task = {"device": device, "cells": cells, "compile_only": True}
        with _Child(worker, ONE_THREAD) as child:
            child.give(task)
            while time.monotonic() < end and not stopped.is_set():
                if child.next_event(POLL_S) is None:
                    return

    with ThreadPoolExecutor(max(len(parts), 1)) as threads:
        try:
            wait([threads.submit(serve, part) for part in parts])
        finally:
            stopped.set()  # when interrupted, the processes end, too


def _memory_limit_mib(device: str) -> float | None:
    available = available_memory_mib() if device == "cpu" else None
    return None if available is None else MEMORY_SHARE * available


class Spare:
    """A worker that is started before there is work for it, so that it has imported PyTorch when there is.

    It takes no memory of a GPU. Leaving the context kills one that was not taken.
    """

    def __init__(self, command: tuple[str, ...]):
        self._command = command
        self._child: _Child | None = None

    def __enter__(self) -> "Spare":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._child is not None:
            self._child.__exit__()

    def start(self) -> None:
        """Starts one, unless one waits."""
        if self._child is None:
            self._child = _Child(self._command)

    def take(self) -> "_Child":
        """The one that waits, else a fresh one."""
        self.start()
        child, self._child = self._child, None
        assert child is not None
        return child


class _Child:
    """One worker and its events; leaving the context kills it and whatever it started."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str] | None = None):
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        started = []
        try:
            with children.signals_kept():
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    cwd=ROOT,
                    env={**os.environ, **(environment or {})},
                    text=True,
                    start_new_session=True,  # Ctrl-C is the parent's to handle
                )
                children.register(self._process.pid)
                started.append(self._process.pid)
        except BaseException:  # a signal that came meanwhile: nobody else knows of the process yet
            for pid in started:
                children.end(pid)
            raise
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def give(self, task: Event) -> None:
        """Its one task."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already: next_event says so
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *exception: object) -> None:
        children.end(self._process.pid)
        self._process.wait()
        self._stderr.close()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def next_event(self, limit_s: float) -> Event | None:
        """The next event; `{"event": "timeout"}` when none came in time, None when the worker ended."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                return {"event": "timeout"}
            if line is None:
                return None
            with contextlib.suppress(json.JSONDecodeError):  # a line torn by a crash: the end follows
                return json.loads(line)

    def why_it_ended(self) -> str:
        """The signal or exit status, and the last line of stderr."""
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code} before a result"
        if code == -signal.SIGKILL:
            how += " (the system does this when memory runs out)"
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return f"{how}: {lines[-1][:200]}" if lines else how

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                self._lines.put(line)
        self._lines.put(None)
