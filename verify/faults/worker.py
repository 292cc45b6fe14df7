"""Runs checks on copies of flashjvp, each in its own process, which is forked after PyTorch and Triton were loaded.

`python -m verify.faults.worker` reads a JSON list of jobs (the arguments of `findings`) from its input, and prints one
JSON line for each as it ends.
"""

import json
import os
import sys
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._decomp.decompositions_for_jvp  # what a check would load on first use, which takes longer than most checks
import torch._dynamo
import torch.distributed.tensor
import triton  # noqa: F401

from ..cases.inputs import make_inputs
from ..emulator import interpreter
from .fault import CASE_BY_NAME, EMULATED_CHECKS

CONTEXT = get_context("fork")
Job = dict[str, Any]


def findings(folder: str, backend: Any, check: str, case: str, seed: int) -> list[dict[str, Any]]:
    """What a check finds of the flashjvp in `folder`: quantity, error, budget and ok of each comparison.

    Imports that copy of flashjvp, so it may run once in a process.
    """
    sys.path.insert(0, folder)
    import flashjvp

    from ..checks.against_float64 import against_float64
    from ..checks.emulated import EMULATED
    from ..checks.registry import IN_PYTORCH
    from ..oracles.attention import Subject
    from ..oracles.identities import IDENTITIES

    assert flashjvp.__file__.startswith(folder), f"{flashjvp.__file__} is not the copy in {folder}"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" or check in EMULATED_CHECKS
    device = "cuda" if backend == "triton" and not interpreted else "cpu"
    checks = IDENTITIES | IN_PYTORCH | EMULATED | {"float64": against_float64}
    inputs = make_inputs(CASE_BY_NAME[case], torch.float32, device, seed)
    return [vars(identity) for identity in checks[check](inputs, Subject(backend))]


def _child(job: Job, answer: Connection) -> None:
    try:
        answer.send({"findings": findings(**job)})
    except Exception as error:
        answer.send({"failure": f"{type(error).__name__}: {error}"})


def serve(jobs: list[Job], processes: int) -> None:
    """Prints the answer to each job, with its place in the list; a process that dies counts as a failure."""
    waiting = list(enumerate(jobs))
    running: dict[Any, Any] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            place, job = waiting.pop(0)
            answer, end = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_child, args=(job, end), daemon=True)
            process.start()
            end.close()
            running[process.sentinel] = place, process, answer
        for ended in connection.wait(list(running)):
            place, process, answer = running.pop(ended)
            process.join()
            try:
                result = answer.recv()
            except EOFError:
                result = {"failure": f"the process ended with exit code {process.exitcode}"}
            print(json.dumps({"place": place, **result}), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.hasten()
    serve(json.load(sys.stdin), processes=min(os.cpu_count() or 1, 8))
