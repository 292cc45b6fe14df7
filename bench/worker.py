"""The child process of a sweep: reads one task, measures its cells in order, writes one JSON line an event.

Task (one line on stdin): `{"device": ..., "dtype": ..., "memory_limit_mib": ..., "cells": [{"id", "provider",
"case"}]}`. Events (lines on stdout): `environment` when the task has no cells, else `start` and `outcome` for each
cell. Whatever else is printed goes to stderr. The parent keeps stdin open: its end means that the parent is gone, and
the worker ends with it.
"""

import dataclasses
import json
import os
import re
import resource
import sys
import threading
from typing import Any, TextIO

import torch

from . import gate, measure
from .cases import Case, make_inputs, require_gradients
from .environment import describe
from .providers import PROVIDERS

Outcome = dict[str, Any]


def main() -> None:
    events = _take_stdout()
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = _device(task["device"])
    if not task["cells"]:
        environment = dataclasses.asdict(describe(device, task["dtype"] or _default_dtype(device)))
        _write(events, {"event": "environment", **environment})
        return
    if device.type == "cpu" and task["memory_limit_mib"] is not None:
        _limit_memory(task["memory_limit_mib"])
    for cell in task["cells"]:
        _write(events, {"event": "start", "id": cell["id"]})
        outcome = run_cell(cell["provider"], Case(**cell["case"]), device)
        _write(events, {"event": "outcome", "id": cell["id"], **outcome})
        if outcome["status"] in ("error", "crashed"):
            return  # the process, or its CUDA context, may be damaged: the parent starts a fresh one


def run_cell(name: str, case: Case, device: torch.device) -> Outcome:
    """Gate, memory, latency of one provider on one case; the measured columns of a row, `status` and `reason`."""
    provider = PROVIDERS[name]
    if reason := provider.why_not(case, device.type):
        return {"status": "unsupported", "reason": reason}
    outcome: Outcome = {}
    try:
        attention = provider.load()
        verdict = gate.check(attention, case, device)
        outcome |= {"err_o": verdict.err_o, "err_o_t": verdict.err_o_t, "err_grad": verdict.err_grad}
        if verdict.reason:
            return {**outcome, "status": "wrong", "reason": verdict.reason}
        inputs = make_inputs(case, device)
        if case.backward:
            require_gradients(inputs)

        def call() -> object:
            return measure.results(attention, inputs, case.backward)

        if device.type == "cuda":
            call()  # compiles, and fills the library workspaces that are not the call's own memory
        outcome["peak_mib"] = measure.peak_mib(call, device)
        timed = measure.latency(call, device)
    except Exception as error:
        status, reason = classify(error)
        return {**outcome, "status": status, "reason": reason}
    times = {f"latency_{key}": value for key, value in dataclasses.asdict(timed).items() if key != "repeats"}
    return {**outcome, **times, "repeats": timed.repeats, "status": "ok", "reason": ""}


def classify(error: Exception) -> tuple[str, str]:
    """The status of a row whose provider raised, and the reason in one line."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if asked := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", reason):
        return "oom", f"cannot allocate {int(asked[1]) / 2**20:.0f} MiB more"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom", reason
    if isinstance(error, NotImplementedError | ImportError):
        return "unsupported", reason
    if isinstance(error, torch.AcceleratorError):
        return "crashed", reason  # such as an illegal memory access: the CUDA context is lost
    return "error", reason


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


def _default_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


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
