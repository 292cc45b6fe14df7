"""What flashjvp asks of the machine: whether Triton is there, which release, and what a GPU is.

The library asks nowhere else. Tests that stand for another machine replace these functions and nothing else, with the
fixture `machine` of tests/conftest.py.
"""

import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

Key = TypeVar("Key")
Answer = TypeVar("Answer")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_FORGET: list[Callable[[], None]] = []


def kept(answers: dict[Key, Answer]) -> dict[Key, Answer]:
    """A dict of answers about this machine, which `forget` empties."""
    _FORGET.append(answers.clear)
    return answers


def forget() -> None:
    """Asks everything again, as a new process would."""
    for clear in _FORGET:
        clear()


# device index -> compute capability, asked of the driver once
_CAPABILITIES: dict[int | None, tuple[int, int]] = kept({})


def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; None is the current one."""
    found = _CAPABILITIES.get(index)
    if found is None:
        found = _CAPABILITIES[index] = torch.cuda.get_device_capability(index)
    return found


# device index -> multiprocessors, asked of the driver once
_MULTIPROCESSORS: dict[int | None, int] = kept({})


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has. Other devices stand for one with as many as an H100 or H200."""
    if device.type != "cuda":
        return 132
    found = _MULTIPROCESSORS.get(device.index)
    if found is None:
        properties = torch.cuda.get_device_properties(device)
        found = _MULTIPROCESSORS[device.index] = properties.multi_processor_count
    return found


def device_name(device: torch.device) -> str:
    """What the driver calls a CUDA device."""
    return torch.cuda.get_device_name(device)


def is_amd() -> bool:
    """Whether `cuda` devices are AMD ones."""
    return torch.version.hip is not None


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _HAS_TRITON


@cache
def triton_release() -> tuple[int, int]:
    """Major and minor number of the Triton that is installed."""
    import triton

    major, minor = re.findall(r"\d+", triton.__version__)[:2]
    return int(major), int(minor)


def triton_cache() -> Path:
    """Where Triton keeps what it compiled."""
    from triton import knobs

    return Path(knobs.cache.dir)
