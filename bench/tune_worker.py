"""The child process of a search for tiles: compiles candidates for a GPU that need not be there, or times them.

It reads one task, {"cells": [{"id", "stage": "compile" or "time", fields of a candidate}]}, and writes the events of
bench.worker. Candidates share a process; its end costs one candidate. TRITON_INTERPRET must not be set.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from flashjvp import kernels
from flashjvp.kernels import recordings, schedule
from flashjvp.kernels.launch import Call
from verify import cases, codegen, codegen_runs, oracles, tolerance

from . import worker
from .cell import classify
from .measure import Work, latency
from .trials import Candidate

DEVICE = torch.device("cuda")
LENGTH, HEADS = 4096, 24
CHECKED_LENGTH, CHECKED_HEADS = 200, 2  # with a ragged last tile
# The gradients (of q, k, v, q_t, k_t, v_t) that launch a family and, but for the row sums, nothing else beside them.
WANTED = {
    "rowsums": (True, False, False, True, False, False),
    "backward_query": (True, False, False, True, False, False),
    "backward_key": (False, True, False, False, True, False),
    "backward_value": (False, False, True, False, False, True),
    "backward_key_value": (False, True, True, False, True, True),
}


def main() -> None:
    events = worker._take_stdout()
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=worker._end_with_parent, daemon=True).start()
    for cell in task["cells"]:
        number, stage = cell.pop("id"), cell.pop("stage")
        worker._write(events, {"event": "start", "id": number})
        try:
            outcome = {"compile": compiled, "time": timed}[stage](Candidate(**cell))
        except Exception as error:
            status, reason = classify(error)
            outcome = {"status": status, "reason": reason}
        worker._write(events, {"event": "outcome", "id": number, **outcome})
        if outcome["status"] in ("error", "crashed"):
            return  # the process, or its CUDA context, may be damaged: the parent starts a fresh one


def compiled(candidate: Candidate) -> dict[str, Any]:
    """What the compiler makes of a candidate; skipped where that fails, does not fit or spills in a loop."""
    with only(candidate), patch.object(codegen_runs, "call", lambda _: launch(candidate, inputs_of(candidate, "meta"))):
        job = codegen.Configuration(candidate.arch, candidate.kind, candidate.head_dim, candidate.head_dim)
        (kernel,) = codegen_runs.compile_all(job)
    reason = codegen.fault(kernel, triton.__version__)
    if not reason and kernel.loop_spill_share > codegen.VERSION_SPILLS:
        reason = f"spills: {kernel.loop_spill_share:.1%} of a loop's instructions, at most {codegen.VERSION_SPILLS:.1%}"
    columns = ("registers", "spill_bytes", "loop_spill_share", "shared_bytes")
    found = {} if kernel.failure else {name: getattr(kernel, name) for name in columns}
    return {**found, "status": "skipped" if reason else "compiled", "reason": reason}


def timed(candidate: Candidate) -> dict[str, Any]:
    """The candidate's results on a small shape are judged by verify's budget; then its kernel alone is timed."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if candidate.kind == "tf32" else "ieee"
    with tile_in_use(candidate):
        inputs, exact, budgets = reference(candidate.kind, candidate.head_dim)
        results = launch(candidate, inputs)
        checked = {name: budgets[name] for name in results}
        found = {name: x.to(torch.float64) for name, x in results.items()}
        beyond = [row for row in tolerance.check(replace(exact, **found), exact, checked) if not row.ok]
        if beyond:
            reason = ", ".join(
                f"{row.tensor} {row.frobenius:.2e} (budget {row.frobenius_budget:.2e})" for row in beyond
            )
            return {"status": "wrong", "reason": reason}
        (again,) = captured(candidate, inputs_of(candidate, DEVICE))
        found_ms = latency(Work(lambda _: again()), DEVICE)
    columns = {name if name == "repeats" else f"latency_{name}": value for name, value in asdict(found_ms).items()}
    return {**columns, "status": "ok", "reason": ""}


def launch(candidate: Candidate, inputs: cases.Inputs) -> dict[str, Tensor]:
    """Calls the library so that it launches the candidate's family; returns the results by their names."""
    operands = (inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t)
    options = (inputs.mask, False, inputs.c)
    o, o_t, lse, mu = kernels.forward_jvp(*operands, *options)
    if candidate.family == "forward":
        return {"o": o, "o_t": o_t}
    wanted = WANTED[candidate.family]
    grads = kernels.backward_jvp(inputs.d_o, inputs.d_o_t, *operands, o, o_t, lse, mu, *options, wanted)
    return {name: x for name, x in zip(oracles.NAMES[2:], grads, strict=True) if x is not None}


def captured(candidate: Candidate, inputs: cases.Inputs) -> list[Callable[[], None]]:
    """The launches of the candidate's family in one call, each to be repeated by itself."""
    original, found = Call.launch, []

    def kept(call: Call, kernel: Any, family: str, *rest: Any) -> None:
        original(call, kernel, family, *rest)
        if family == candidate.family:
            found.append(lambda: original(call, kernel, family, *rest))

    recordings.forget()  # a played call makes no Call
    with patch.object(Call, "launch", kept):
        launch(candidate, inputs)
    return found


@contextmanager
def only(candidate: Candidate) -> Iterator[None]:
    """The library launches nothing but the candidate's family, and that with its tile."""
    original = Call.launch

    def chosen(call: Call, kernel: Any, family: str, *rest: Any) -> None:
        if family == candidate.family:
            original(call, kernel, family, *rest)

    with tile_in_use(candidate), patch.object(Call, "launch", chosen):
        yield


@contextmanager
def tile_in_use(candidate: Candidate) -> Iterator[None]:
    """The tables hold the candidate's tile for its family, whatever the head dim; no pipelines stand before them."""
    entries = schedule.TABLES[candidate.arch][candidate.kind][candidate.family]
    recordings.forget()
    try:
        tables: Any = patch.object(schedule, "pipelines", lambda device, kind, width: {})
        with tables, patch.dict(entries, dict.fromkeys(entries, candidate.tile)):
            yield
    finally:
        recordings.forget()


@lru_cache
def reference(kind: str, head_dim: int) -> tuple[cases.Inputs, oracles.Results, tolerance.Budgets]:
    """A small call on the GPU, its results in float64, and the budgets."""
    case = cases.Case(
        "tune", batch=(1,), q_heads=CHECKED_HEADS, kv_heads=CHECKED_HEADS, m=CHECKED_LENGTH, n=CHECKED_LENGTH,
        d=head_dim, dv=head_dim,
    )  # fmt: skip
    inputs = cases.make_inputs(case, torch.bfloat16 if kind == "half" else torch.float32, DEVICE)
    exact = oracles.dense64(inputs)
    return inputs, exact, tolerance.budget(inputs, exact, oracles.dense_same_type(inputs))


def inputs_of(candidate: Candidate, device: torch.device | str) -> cases.Inputs:
    """The call that is compiled and timed: random numbers, no memory at all on the meta device."""
    case = cases.Case(
        "tune", batch=(1,), q_heads=HEADS, kv_heads=HEADS, m=LENGTH, n=LENGTH, d=candidate.head_dim,
        dv=candidate.head_dim,
    )  # fmt: skip
    dtype = torch.bfloat16 if candidate.kind == "half" else torch.float32
    if device != "meta":
        return cases.make_inputs(case, dtype, device)
    q = torch.empty(1, HEADS, LENGTH, candidate.head_dim, dtype=dtype, device=device)
    return cases.Inputs(q, q, q, q, q, q, None, q, q)


if __name__ == "__main__":
    main()
