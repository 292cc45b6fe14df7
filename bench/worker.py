"""The child process of a sweep: reads one task, measures its cells in order, writes one JSON line an event.

Task (one line on stdin): `{"device": ..., "dtypes": ..., "memory_limit_mib": ..., "cells": [{"id", "provider", "paths",
"case", "repeat_s"}]}`, where `paths` is what the provider is imported from, before everything else; with
`"compile_only": true` the cells are called, not measured. Events (lines on stdout): `environments` when the task has no
cells, found for each of `dtypes`, which are by kind of device; else `start` and `outcome` for each cell. Whatever else
is printed goes to stderr. The parent keeps stdin open: its end means that the parent is gone, and the worker ends with
it.
"""

import dataclasses
import gc
import json
import os
import resource
import sys
import threading
from typing import Any, TextIO

import torch

from .cases import Case
from .cell import Cells
from .environment import describe


def main() -> None:
    events = _take_stdout()
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = _device(task["device"])
    if not task["cells"]:
        found = [{"dtype": x, **dataclasses.asdict(describe(device, x))} for x in task["dtypes"][device.type]]
        _write(events, {"event": "environments", "found": found})
        return
    if device.type == "cpu" and task.get("memory_limit_mib") is not None:
        _limit_memory(task["memory_limit_mib"])
    cells = Cells(device)
    for cell in task["cells"]:
        _write(events, {"event": "start", "id": cell["id"]})
        sys.path[:0] = [path for path in cell["paths"] if path not in sys.path]
        case = Case(**cell["case"])
        gc.freeze()  # what is there stays, modules above all: cells collect garbage, several times each
        if task.get("compile_only"):
            outcome = cells.compiled(cell["provider"], case)
        else:
            outcome = cells.outcome(cell["provider"], case, cell.get("repeat_s"))
        _write(events, {"event": "outcome", "id": cell["id"], **outcome})
        if outcome["status"] == "crashed":
            return  # the CUDA context is lost: the parent starts a fresh process


def _take_stdout() -> TextIO:
    """The real stdout for events alone; what libraries print to file descriptor 1 goes to stderr."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return events


def _write(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _limit_memory(limit_mib: float) -> None:
    """Bounds what the process may map beyond what it has now: too large a call raises, and the machine lives."""
    if not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limit = mapped + int(limit_mib * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
