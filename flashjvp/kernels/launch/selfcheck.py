"""Whether the warp-specialised kernels may serve with a Triton that they were not measured with.

On first use a few small calls are made, once a process and card: their results must be as near to float64 as bfloat16
allows, and their kernels may spill little more than those that were measured. (The driver tells how many registers a
kernel spills, not whether in a loop; a disassembler, which tells, is not always there.) Otherwise the portable kernels
serve, and a warning says why. The answer is kept on disk for this card, Triton, PyTorch and source, so that a check
takes a millisecond; the first takes as long as its kernels take to compile.
"""

import hashlib
import json
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from ... import environment
from ...backends import reference
from .driver import index_of, on_device
from .hopper_tables import MEASURED, Release

# Head dim, rows, and whether with tangents: all families, one of them with sums of query gradients.
CALLS = ((64, 192, True), (64, 192, False), (128, 192, True), (128, 2048, True))
MOST_ERROR = 2.0  # of a result's norm, in units of bfloat16's precision: results that are right have 0.6
MOST_SPILLED = 24  # registers of a thread: of measured kernels at most 18; 32 in one that was a third slower for them

# What is checked: the functions of the backend, and call.py, which keeps what Triton compiles for them, by keys that
# begin with the kernel. `backends/triton.py` puts both here, since they stand above this file.
SUBJECT: list[tuple[Any, Any]] = []

_LOCK = threading.Lock()
_THREAD = threading.local()
_FOUND: dict[str, str | None] = environment.kept({})  # by card


def why_not(release: Release, device: torch.device) -> str | None:
    """Why the kernels do not serve with this release, which was not measured; None if they do."""
    if release < MEASURED[0]:
        oldest = ".".join(map(str, MEASURED[0]))
        return _with_remedy(f"the warp-specialised kernels need Triton {oldest} or newer, not {triton.__version__}")
    if device.type != "cuda" or getattr(_THREAD, "checks", False):
        return None  # they are only compiled, or being checked
    card = environment.device_name(device)
    if card not in _FOUND:
        if torch.compiler.is_compiling() or environment.is_capturing():
            return f"Triton {triton.__version__} is checked on first use, which may be no capture of a graph"
        with _LOCK:
            if card not in _FOUND:
                _FOUND[card] = _remembered(card, device)
    found = _FOUND[card]
    return None if found is None else _with_remedy(f"with Triton {triton.__version__}, which they do not know, {found}")


def _with_remedy(reason: str) -> str:
    """The reason, and what the user can do about it."""
    names = ", ".join(".".join(map(str, release)) for release in MEASURED)
    return f"{reason}. Install a Triton that they were measured with ({names}), or a newer flashjvp"


def _remembered(card: str, device: torch.device) -> str | None:
    """What an earlier process found, or what is found now. What a check raised is forgotten with the process."""
    path = _path(card)
    try:
        found = json.loads(path.read_text())["reason"]
        if found is None or isinstance(found, str):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it is no answer
    try:
        # A thread of its own has no modes, transforms or stream of the caller.
        with ThreadPoolExecutor(1) as thread:
            reason = thread.submit(_checked, device).result()
    except Exception as error:  # whatever a compiler or a driver raises
        return f"a check raised {type(error).__name__}: {str(error).strip()[:200]}"
    _remember(path, reason)
    return reason


def _path(card: str) -> Path:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    mode = torch.are_deterministic_algorithms_enabled()
    digest.update(repr((triton.__version__, torch.__version__, card, mode)).encode())
    return environment.triton_cache() / f"flashjvp-{digest.hexdigest()[:32]}.json"


def _remember(path: Path, reason: str | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"reason": reason}, file)
        os.replace(file.name, path)
    except OSError:
        pass  # the next process checks again


def _checked(device: torch.device) -> str | None:
    """Why the kernels should not serve, or None."""
    ((kernels, launches),) = SUBJECT
    compiled = launches._COMPILED
    _THREAD.checks = True
    before = set(compiled)
    with on_device(index_of(device)):
        for width, rows, jvp in CALLS:
            if (reason := _wrong(kernels, device, width, rows, jvp)) is not None:
                return reason
    for key in compiled.keys() - before:
        kernel, *_ = key
        if (spilled := compiled[key].n_spills) > MOST_SPILLED:
            return f"{kernel.__name__} spills {spilled} registers"
    return None


def _wrong(kernels: ModuleType, device: torch.device, width: int, rows: int, jvp: bool) -> str | None:
    """Which result is wrong, if one is."""
    inputs = _inputs(device, width, rows)
    found, exact = _results(kernels, inputs, jvp), _results(reference, [x.double() for x in inputs], jvp)
    for name in exact:
        error = float((found[name] - exact[name]).norm() / exact[name].norm()) / torch.finfo(inputs[0].dtype).eps
        if not error <= MOST_ERROR:
            return f"{name} is wrong (D = {width}, {rows} rows): {error:.1f} times the precision of its type"
    return None


def _inputs(device: torch.device, width: int, rows: int) -> list[Tensor]:
    """q, k, v, their tangents and the cotangents, from a generator of their own."""
    generator = torch.Generator().manual_seed(width + rows)
    shape = (1, 1, rows, width)
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(8)]


def _results(backend: ModuleType, tensors: list[Tensor], jvp: bool) -> dict[str, Tensor]:
    """Outputs and gradients, in float64."""
    suffix = "_jvp" if jvp else ""
    forward, backward = (getattr(backend, name + suffix) for name in ("forward", "backward"))
    inputs, d_o = tensors[: 6 if jvp else 3], tensors[6 : 8 if jvp else 7]
    scale = inputs[0].shape[-1] ** -0.5
    none = (None,) * (3 if jvp else 2)  # no mask, no tangent of it, no seed of dropout
    outputs = forward(*inputs, *none, False, scale, 0.0)
    wanted = (True,) * len(inputs) + (False,) * (len(none) - 1)
    grads = backward(*d_o, *inputs, *outputs, *none, False, scale, 0.0, wanted)
    names = ("o", "o_t", "lse", "mu") if jvp else ("o", "lse")
    names += ("d_q", "d_k", "d_v", "d_q_t", "d_k_t", "d_v_t")[: len(inputs)]
    results = (*outputs, *grads[: len(inputs)])
    return {name: x.double() for name, x in zip(names, results, strict=True) if name not in ("lse", "mu")}
