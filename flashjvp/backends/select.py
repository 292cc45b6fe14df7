"""Which backend serves a call: a name, or None for the best one that the device and the dtype allow."""

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import environment, support
from ..errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from ..performance import warn_once

NAMES = ("triton", "tiled", "reference")
MAX_HEAD_DIM = 256
"""Of the kernels. The other backends take any."""
# Compute capabilities whose programs have 99 KB of shared memory, and the widest head dim of IEEE float32 there.
WITH_99_KB = ((8, 6), (8, 9), (12, 0))
MAX_IEEE_IN_99_KB = 128
_TOO_WIDE = (
    f"expected head dims of at most {MAX_HEAD_DIM} ({MAX_IEEE_IN_99_KB} for float32 without TF32 on cards with 99 KB "
    "of shared memory), got a wider one (use 'tiled' or 'reference')"
)


COMPOSED: dict[str, Any] = {}
"""Backends that are built on these, by a name that says how. The public functions do not take their names."""

_RESOLVED: dict[tuple[str | None, torch.device, torch.dtype, bool], ModuleType] = environment.kept({})


FAMILIES: dict[str, Callable[[str], Any]] = {}
"""Others, of which there is one for each name `family:...`: what makes it from the rest of its name."""

FAMILIES_BY_TENSORS: dict[str, Callable[[str, Tensor, Tensor], Any]] = {}
"""Those that are other ones for other q and v."""


def resolve(name: str | None, device: torch.device, dtype: torch.dtype, wide: bool = False) -> ModuleType:
    """The module that implements backend `name`; None means triton on a GPU that it supports, else tiled.

    `wide`: whether head dims are too wide for the kernels (is_wide).

    Warns where a GPU gets tiled, but for its dtype, which is the user's choice.
    """
    found = _RESOLVED.get((name, device, dtype, wide))
    if found is None:
        found, is_final = _resolved(name, device, dtype, wide)
        if is_final:
            _RESOLVED[name, device, dtype, wide] = found
    return found


def _resolved(name: str | None, device: torch.device, dtype: torch.dtype, wide: bool) -> tuple[ModuleType, bool]:
    """The module, and whether the answer is the same next time: not where a card could not be checked."""
    is_final = True
    if name is None:
        name = choose(device, dtype, wide)
        if name == "tiled" and device.type == "cuda" and dtype != torch.float64:
            reason = obstacle("triton", device, dtype, wide)
            warn_once(f"{device} runs attention in plain PyTorch (tiled), without its kernels: {reason}")
            is_final = not _is_postponed(device)
    if name == "triton":
        from . import triton as kernels

        return kernels, is_final
    if name == "tiled":
        from . import tiled

        return tiled, is_final
    from . import reference

    return reference, is_final


def serving(name: str | None, q: Tensor, v: Tensor) -> Any:
    """What implements backend `name` for these tensors: the composed one of this name, or a module."""
    composed = COMPOSED.get(name) if name is not None else None
    if composed is None and name is not None and ":" in name:
        family, _, rest = name.partition(":")
        return FAMILIES_BY_TENSORS[family](rest, q, v) if family in FAMILIES_BY_TENSORS else _of_family(name)
    return resolve(name, q.device, q.dtype, is_wide(q, v)) if composed is None else composed


@cache
def _of_family(name: str) -> Any:
    family, _, rest = name.partition(":")
    return FAMILIES[family](rest)


def result_dtype(name: str | None, dtype: torch.dtype) -> torch.dtype:
    """The type of o and o_t that backend `name` gives for q of a type: float32 where it is more precise (high.py)."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if is_half and name is not None and name.startswith("high:") else dtype


def is_wide(q: Tensor, v: Tensor) -> bool:
    """Whether a head dim is too wide for the kernels."""
    return is_too_wide(max(q.shape[-1], v.shape[-1]), q.device, q.dtype)


def is_too_wide(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels of this type have no tiles for so wide a head dim on this device."""
    return width > MAX_HEAD_DIM or (width > MAX_IEEE_IN_99_KB and dtype == torch.float32 and _is_small(device))


def _is_small(device: torch.device) -> bool:
    """Whether a program has 99 KB of shared memory and float32 is not rounded to TF32 for products.

    Four tensors' rows of keys and four of queries, 16 each, then take more at a head dim of 256.
    """
    if device.type != "cuda" or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return False
    return environment.capability(device.index) in WITH_99_KB


def choose(device: torch.device, dtype: torch.dtype, wide: bool = False) -> str:
    """The name of the backend that serves a call which asks for none."""
    return "triton" if device.type == "cuda" and obstacle("triton", device, dtype, wide) is None else "tiled"


def check(name: object, device: torch.device, dtype: torch.dtype) -> None:
    """Raises when `name` is no backend, or one that cannot serve tensors of this device and dtype."""
    if not isinstance(name, str):
        raise ArgumentTypeError(f"backend: expected None or one of {NAMES}, got {type(name).__name__}")
    if name not in NAMES:
        raise ArgumentValueError(f"backend: expected None or one of {NAMES}, got {name!r}")
    reason = obstacle(name, device, dtype)
    if reason is not None:
        raise UnsupportedError(f"backend: {name!r} {reason}")


def check_head_dims(name: str, wide: bool) -> None:
    """Raises when backend `name` has no kernels for head dims so wide."""
    if name == "triton" and wide:
        raise UnsupportedError(f"backend: 'triton' {_TOO_WIDE}")


def obstacle(name: str, device: torch.device, dtype: torch.dtype, wide: bool = False) -> str | None:
    """Why backend `name` cannot serve tensors of this device and dtype, or None when it can."""
    if name == "triton" and wide:
        return _TOO_WIDE
    if name != "triton" or device.type == "meta":
        return None
    if dtype == torch.float64:
        return "expected float16, bfloat16 or float32, got float64 (use 'tiled' or 'reference')"
    reason = _triton_obstacle(device.type, device.index, dtype == torch.bfloat16)
    if reason is None and device.type == "cuda" and _is_unmeasured(device):
        from ..kernels.launch import selfcheck

        return selfcheck.why_not_on(device, dtype)
    return reason


def _is_unmeasured(device: torch.device) -> bool:
    """Whether nobody ran the kernels on such a card."""
    return support.tried(environment.capability(device.index)) == support.COMPILED


def _is_postponed(device: torch.device) -> bool:
    """Whether a card has still to be checked and cannot be now."""
    if device.type != "cuda" or not environment.has_triton() or not _is_unmeasured(device):
        return False
    from ..kernels.launch import selfcheck

    return selfcheck.is_postponed()


def _triton_obstacle(device_type: str, index: int | None, bfloat16: bool) -> str | None:
    if not environment.has_triton():
        return "expected the triton package, got an installation without it (pip install triton)"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "expected a GPU (or TRITON_INTERPRET=1, which interprets the kernels), got tensors on the cpu"
        if bfloat16:
            return "expected float16 or float32 under TRITON_INTERPRET=1, got bfloat16, whose products it gets wrong"
        return None
    if device_type != "cuda":
        return f"expected tensors on a cuda device, got {device_type}"
    if environment.is_amd():
        return "expected an NVIDIA GPU, got an AMD one, for which there are no kernels"
    capability = environment.capability(index)
    if support.tried(capability) is None:
        *others, last = (card.capability for card in support.CARDS)
        return f"expected compute capability {', '.join(others)} or {last}, got {capability}"
    return None
