"""The child process of a search for tiles: compiles candidates for a GPU that need not be there, or times them.

It reads one task, {"cells": [{"id", "stage": "compile" or "time", fields of a candidate}]}, and writes the events of
bench.worker. Candidates share a process; its end costs one candidate. TRITON_INTERPRET must not be set.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashjvp.backends import triton as kernels
from flashjvp.kernels.launch import replaced, schedule
from flashjvp.kernels.launch.call import Call
from flashjvp.kernels.launch.hopper_tables import PIPELINES, Families, Pipeline
from flashjvp.kernels.launch.schedule import Tile
from verify.budget import tolerance
from verify.cases.case import Case
from verify.cases.inputs import Inputs, make_inputs
from verify.codegen.command import unusable
from verify.codegen.configuration import Configuration
from verify.codegen.worker import compile_all
from verify.oracles import attention as oracles

from . import worker
from .cell import classify
from .measure import Work, latency
from .tile_table import PIPELINE_KINDS
from .trials import Candidate

DEVICE = torch.device("cuda")
MOST_SPILLS = 1 / 16  # of a loop's instructions: some tiles that spill are faster than any that do not
LENGTH, HEADS = 4096, 24
CHECKED_LENGTH, CHECKED_HEADS = 200, 2  # with a ragged last tile
OF_MASKS = "backward_bias"  # the family of gradients of a mask and of its tangent
PLAIN: dict[str, Any] = {"tangents": (), "cotangents": ("o",)}
# The gradients (of q, k, v, q_t, k_t, v_t) that launch a family and, but for the preprocess, nothing else beside them.
# The warp-specialised kernels serve calls for all of them. With OF_MASKS, a mask and its tangent have gradients.
WANTED = {
    "backward_preprocess": (True, False, False, True, False, False),
    "backward_query": (True, False, False, True, False, False),
    "backward_key": (False, True, False, False, True, False),
    "backward_value": (False, False, True, False, False, True),
    "backward_key_value": (False, True, True, False, True, True),
    OF_MASKS: (False,) * 6,
}


# What the kernel of one pass, where there is one, stands in for.
IN_ONE_PASS = ("backward_pairs", "backward_dq_accum", "backward_key", "backward_value")


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
    with only(candidate):
        size, tangents = candidate.head_dim, "" if candidate.kind == "plain" else "qkv"
        mask = "learned" if candidate.family == OF_MASKS else ""
        job = Configuration(candidate.arch, product(candidate), size, size, tangents, mask=mask)
        (kernel,) = compile_all(job, lambda _: launch(candidate, inputs_of(candidate, "meta")))
    reason = unusable(kernel)
    if not reason and kernel.loop_spill_share > MOST_SPILLS:
        reason = f"spills: {kernel.loop_spill_share:.1%} of a loop's instructions, at most {MOST_SPILLS:.1%}"
    columns = ("registers", "spill_bytes", "loop_spill_share", "shared_bytes")
    found = {} if kernel.failure else {name: getattr(kernel, name) for name in columns}
    return {**found, "status": "skipped" if reason else "compiled", "reason": reason}


def timed(candidate: Candidate) -> dict[str, Any]:
    """The candidate's results on a small shape are judged by verify's budget; then its kernel alone is timed."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if candidate.kind == "tf32" else "ieee"
    with tile_in_use(candidate):
        inputs, exact, budgets = reference(product(candidate), candidate.head_dim, candidate.kind == "plain")
        if candidate.family == OF_MASKS:
            inputs = replace(inputs, mask=_mask(inputs.q, CHECKED_HEADS))
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


def product(candidate: Candidate) -> str:
    """The input precision."""
    return "half" if candidate.kind in PIPELINE_KINDS else candidate.kind


def launch(candidate: Candidate, inputs: Inputs) -> dict[str, Tensor]:
    """Calls the library so that it launches the candidate's family; returns the results by their names."""
    options = (False, inputs.c, 0.0)
    primals = (inputs.q, inputs.k, inputs.v)
    assert inputs.d_o is not None
    if candidate.kind == "plain":
        o, lse = kernels.forward(*primals, inputs.mask, None, *options)
        if candidate.family == "forward":
            return {"o": o}
        plain = kernels.backward(inputs.d_o, *primals, o, lse, inputs.mask, None, *options, (True, True, True, False))
        return {name: x for name, x in zip(oracles.NAMES[2:5], plain, strict=False) if x is not None}
    operands = (*primals, inputs.q_t, inputs.k_t, inputs.v_t)
    mask_t = None if inputs.mask is None else torch.zeros_like(inputs.mask)  # a mask is one with gradients
    masks = (inputs.mask, mask_t, None)
    o, o_t, lse, mu = kernels.forward_jvp(*operands, *masks, *options)
    if candidate.family == "forward":
        return {"o": o, "o_t": o_t}
    of_inputs = (True,) * 6 if candidate.kind in PIPELINE_KINDS else WANTED[candidate.family]
    wanted = (*of_inputs, mask_t is not None, mask_t is not None)
    grads = kernels.backward_jvp(inputs.d_o, inputs.d_o_t, *operands, o, o_t, lse, mu, *masks, *options, wanted)
    if mask_t is not None:
        return _of_keys(inputs, grads[6], grads[7])
    return {name: x for name, x in zip(oracles.NAMES[2:], grads, strict=False) if x is not None}


def _mask(q: Tensor, heads: int) -> Tensor:
    """A mask that changes nothing, for so many heads: with one, gradients are summed over all."""
    return q.new_zeros(1, heads, q.shape[-2], q.shape[-2])


def _of_keys(inputs: Inputs, ds: Tensor | None, ds_t: Tensor | None) -> dict[str, Tensor]:
    """The gradients of k and k_t that those of a mask of zeros and of its tangent give, MATH.md (16), (19); none where
    they are summed over heads."""
    assert inputs.q_t is not None and ds is not None and ds_t is not None
    if ds.shape[-3] != inputs.q.shape[-3]:
        return {}
    ds, ds_t, q, q_t = (inputs.c * ds.double().mT, inputs.c * ds_t.double().mT, inputs.q.double(), inputs.q_t.double())
    return {"d_k": ds @ q + ds_t @ q_t, "d_k_t": ds_t @ q}


def captured(candidate: Candidate, inputs: Inputs) -> list[Callable[[], None]]:
    """The launches of the candidate's family in one call, each to be repeated by itself."""
    launch(candidate, inputs)  # a call that compiles asks for its launches twice
    found: list[Callable[[], None]] = []

    def kept(original: Callable[..., None], *call: Any, **constants: Any) -> None:
        original(*call, **constants)
        if is_of(candidate, *call):
            found.append(lambda: original(*call, **constants))

    with replaced.launch(kept):
        launch(candidate, inputs)
    return found


def is_of(candidate: Candidate, call: Call, kernel: Any, family: str, *rest: Any) -> bool:
    """Whether a launch is one of the candidate's family."""
    return family == candidate.family


@contextmanager
def only(candidate: Candidate) -> Iterator[None]:
    """The library launches nothing but the candidate's family, and that with its tile."""

    def chosen(original: Callable[..., None], *call: Any, **constants: Any) -> None:
        if is_of(candidate, *call):
            original(*call, **constants)

    with tile_in_use(candidate), replaced.launch(chosen):
        yield


@contextmanager
def tile_in_use(candidate: Candidate) -> Iterator[None]:
    """The tables hold the candidate's tile for its family, whatever the head dim, and its table alone is in use."""
    pipelines: dict[int, dict[str, Families]] = {}
    with ExitStack() as patches:
        if candidate.kind in PIPELINE_KINDS:
            width = candidate.entry[3]
            pipelines[width] = {kind: dict(tiles) for kind, tiles in PIPELINES[candidate.arch][width].items()}
            if candidate.family in IN_ONE_PASS:
                pipelines[width][candidate.kind].pop("backward_one_pass", None)
            pipelines[width][candidate.kind][candidate.family] = Pipeline(*candidate.tile)
            ordered = candidate.family in ("backward_query", "backward_key")  # others may stand in for these
            patches.enter_context(deterministic(ordered))
        else:
            entries = schedule.TABLES[candidate.arch][candidate.kind][candidate.family]
            patches.enter_context(patch.dict(entries, dict.fromkeys(entries, Tile(*candidate.tile))))
        patches.enter_context(replaced.pipelines(pipelines, dq_accum_from={}))
        yield


@contextmanager
def deterministic(mode: bool) -> Iterator[None]:
    """PyTorch's deterministic mode, or not, in this block."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(mode, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@lru_cache
def reference(kind: str, head_dim: int, plain: bool = False) -> tuple[Inputs, oracles.Results, tolerance.Budgets]:
    """A small call on the GPU, its results in float64, and the budgets."""
    case = Case(
        "tune", batch=(1,), q_heads=CHECKED_HEADS, kv_heads=CHECKED_HEADS, m=CHECKED_LENGTH, n=CHECKED_LENGTH,
        d=head_dim, dv=head_dim, **(PLAIN if plain else {}),
    )  # fmt: skip
    inputs = make_inputs(case, torch.bfloat16 if kind == "half" else torch.float32, DEVICE)
    exact = oracles.dense64(inputs)
    return inputs, exact, tolerance.budget(inputs, exact, oracles.dense_same_type(inputs))


def inputs_of(candidate: Candidate, device: torch.device | str) -> Inputs:
    """The call that is compiled and timed: random numbers, no memory at all on the meta device."""
    case = Case(
        "tune", batch=(1,), q_heads=HEADS, kv_heads=HEADS, m=LENGTH, n=LENGTH, d=candidate.head_dim,
        dv=candidate.head_dim, **(PLAIN if candidate.kind == "plain" else {}),
    )  # fmt: skip
    dtype = torch.bfloat16 if product(candidate) == "half" else torch.float32
    if device != "meta":
        inputs = make_inputs(case, dtype, device)
    else:
        q = torch.empty(1, HEADS, LENGTH, candidate.head_dim, dtype=dtype, device=device)
        t = None if candidate.kind == "plain" else q
        inputs = Inputs(q, q, q, t, t, t, None, q, t)
    return replace(inputs, mask=_mask(inputs.q, 1)) if candidate.family == OF_MASKS else inputs


if __name__ == "__main__":
    main()
