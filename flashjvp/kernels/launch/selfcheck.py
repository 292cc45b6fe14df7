"""Whether the warp-specialised kernels may serve with a Triton that they were not measured with, and the portable ones
on a card that nobody measured.

On first use of a padded head dim, or of a type, a few small calls are made, once a process and card: their results must
be as near to float64 as their type allows. The kernels of another Triton may also spill little more than those that
were measured. (The driver tells how many registers a kernel spills, not whether in a loop; a disassembler, which tells,
is not always there.) Otherwise what is slower serves, and a warning says why. The answer is kept on disk for this card,
Triton, PyTorch and source, so that a later process takes two milliseconds. Before that a check takes under a second,
and as long as its kernels take to compile, side by side.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from ... import environment
from ...backends import reference
from . import compilation
from .driver import index_of, on_device
from .hopper_tables import DQ_ACCUM_FROM, MEASURED, MEASURED_WIDE, Release

ROWS = 192
# Of portable kernels: head dim, rows, and whether with tangents.
CALLS_OF_CARD = ((64, 200, True), (64, 200, False), (128, 200, True))
# Of a result's norm, in units of the precision of the products: results that are right have 0.6 in bfloat16, and 5 in
# float32 without TF32, which also has exponentials of 22 bits.
MOST_ERROR = 2.0
MOST_ERROR_IEEE = 32.0
MOST_SPILLED = 24  # registers of a thread: of measured kernels at most 18; 32 in one that was a third slower for them

# What is checked: the functions of the backend, and call.py, which keeps what Triton compiles for them, by keys that
# begin with the kernel. `backends/triton.py` puts both here, since they stand above this file.
SUBJECT: list[tuple[Any, Any]] = []

_LOCK = threading.Lock()
_THREAD = threading.local()
_FOUND: dict[tuple[str, str], str | None] = environment.kept({})  # by card and what is checked


def why_not(release: Release, device: torch.device, width: int) -> str | None:
    """Why the kernels of a padded head dim do not serve with this release, which was not measured; None if they do."""
    if release < MEASURED[0]:
        oldest = ".".join(map(str, MEASURED[0]))
        return _with_remedy(f"the warp-specialised kernels need Triton {oldest} or newer, not {triton.__version__}")
    if device.type != "cuda" or getattr(_THREAD, "checks", False):
        return None  # they are only compiled, or being checked
    found = _answer(device, f"D = {width}", lambda: _checked(device, width))
    if found is None:
        return None
    measured = MEASURED if width <= 128 else MEASURED_WIDE
    return _with_remedy(f"with Triton {triton.__version__}, which they do not know, {found}", measured)


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the portable kernels do not serve tensors of a type on a card that was not measured; None if they do."""
    if getattr(_THREAD, "checks", False):
        return None
    found = _answer(device, str(dtype), lambda: _checked_card(device, dtype))
    return None if found is None else f"expected kernels that are right on this card, which nobody measured: {found}"


def is_postponed() -> bool:
    """Whether nothing can be checked now: the answer of `why_not_on` is then no answer for later calls."""
    return torch.compiler.is_compiling() or environment.is_capturing()


def precision() -> str | None:
    """The kind of float32 products that this thread checks, whatever PyTorch's setting."""
    return getattr(_THREAD, "precision", None)


def _answer(device: torch.device, what: str, check: Callable[[], str | None]) -> str | None:
    """What is known of a card, or what a check finds now."""
    key = environment.device_name(device), what
    if key not in _FOUND:
        if is_postponed():
            return f"Triton {triton.__version__} is checked on first use, which may be no capture of a graph"
        with _LOCK:
            if key not in _FOUND:
                _FOUND[key] = _remembered(*key, check)
    return _FOUND[key]


def _with_remedy(reason: str, measured: tuple[Release, ...] = MEASURED) -> str:
    """The reason, and what the user can do about it."""
    names = ", ".join(".".join(map(str, release)) for release in measured)
    return f"{reason}. Install a Triton that they were measured with ({names}), or a newer flashjvp"


def _remembered(card: str, what: str, check: Callable[[], str | None]) -> str | None:
    """What an earlier process found, or what is found now. What a check raised is forgotten with the process."""
    path = _path(card, what)
    try:
        found = json.loads(path.read_text())["reason"]
        if found is None or isinstance(found, str):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it is no answer
    try:
        # A thread of its own has no modes, transforms or stream of the caller.
        with ThreadPoolExecutor(1) as thread:
            reason = thread.submit(check).result()
    except Exception as error:  # whatever a compiler or a driver raises
        return f"a check raised {type(error).__name__}: {str(error).strip()[:200]}"
    _remember(path, reason)
    return reason


def _path(card: str, what: str) -> Path:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    mode = torch.are_deterministic_algorithms_enabled()
    digest.update(repr((triton.__version__, torch.__version__, card, mode, what)).encode())
    return environment.triton_cache() / f"flashjvp-{digest.hexdigest()[:32]}.json"


def _remember(path: Path, reason: str | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"reason": reason}, file)
        os.replace(file.name, path)
    except OSError:
        pass  # the next process checks again


def _checked(device: torch.device, width: int) -> str | None:
    """Why the kernels of a padded head dim should not serve, or None: all its families, also with sums of d_q."""
    ((kernels, launches),) = SUBJECT
    compiled = launches._COMPILED
    _THREAD.checks = True
    before = set(compiled)
    calls = [(ROWS, True), (ROWS, False), *((rows, True) for rows in (DQ_ACCUM_FROM.get(width),) if rows)]
    with on_device(index_of(device)):
        _compile_all(kernels, [(_inputs(device, width, rows, torch.bfloat16), jvp) for rows, jvp in calls])
        for rows, jvp in calls:
            if (reason := _wrong(kernels, device, width, rows, jvp)) is not None:
                return reason
    for key in compiled.keys() - before:
        kernel, *_ = key
        if (spilled := compiled[key].n_spills) > MOST_SPILLED:
            return f"{kernel.__name__} spills {spilled} registers"
    return None


def _compile_all(kernels: ModuleType, calls: Sequence[tuple[list[Tensor], bool]]) -> None:
    """Compiles what the calls need side by side."""
    wanted: dict[Any, compilation.Wanted] = {}
    for inputs, jvp in calls:
        wanted |= {x.key: x for x in compilation.kernels_of(_results, kernels, inputs, jvp)}
    compilation.compile_all(list(wanted.values()))


def _checked_card(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the portable kernels should not serve a type, or None."""
    ((kernels, _),) = SUBJECT
    _THREAD.checks = True
    with on_device(index_of(device)):
        for _THREAD.precision in ("tf32", "ieee") if dtype == torch.float32 else (None,):
            _compile_all(kernels, [(_inputs(device, width, rows, dtype), jvp) for width, rows, jvp in CALLS_OF_CARD])
            for width, rows, jvp in CALLS_OF_CARD:
                if (reason := _wrong(kernels, device, width, rows, jvp, dtype)) is not None:
                    return reason
    return None


def _wrong(
    kernels: ModuleType, device: torch.device, width: int, rows: int, jvp: bool, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Which result is wrong, if one is."""
    inputs = _inputs(device, width, rows, dtype)
    found, exact = _results(kernels, inputs, jvp), _results(reference, [x.double() for x in inputs], jvp)
    # TF32 has as many significant bits as float16.
    rounding = torch.finfo(torch.float16 if precision() == "tf32" else dtype).eps
    most = MOST_ERROR_IEEE if precision() == "ieee" else MOST_ERROR
    for name in exact:
        error = float((found[name] - exact[name]).norm() / exact[name].norm()) / rounding
        if not error <= most:
            return f"{name} is wrong (D = {width}, {rows} rows): {error:.1f} times the precision of its type"
    return None


def _inputs(device: torch.device, width: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, their tangents and the cotangents, from a generator of their own."""
    generator = torch.Generator().manual_seed(width + rows)
    shape = (1, 1, rows, width)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(8)]


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
