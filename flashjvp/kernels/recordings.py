"""Calls recorded once and played again: tensors to allocate, launches, and which of the tensors are the results.

All else that a call does in Python follows from sizes, strides, types and options. A recording is of one such set, for
addresses that 16 bytes divide; while it is made, a dispatch mode sees every operator that runs, and a call that does
more than allocate, view and launch is not recorded. A recording holds no tensor.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..guards import Remembered
from . import schedule
from .direct import Launch, Place, current_stream, on_device

Maybe = Tensor | None
P = ParamSpec("P")
Results = TypeVar("Results", bound=tuple[Maybe, ...])

_ALLOCATES = {"new_empty_strided", "new_empty", "empty_like", "empty", "empty_strided"}
_ALLOCATES_ZEROS = {"new_zeros", "zeros_like", "zeros"}
_MASK_ALIGNMENT = 64  # 16 elements of the widest type: see Call._mask_operand
_ACTIVE = threading.local()


class _Buffer(NamedTuple):
    """A tensor that a call allocates."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool


class Recording:
    """What a call does, but for addresses."""

    def __init__(self, buffers: Sequence[_Buffer], launches: Sequence[Launch], results: Sequence[int | None]) -> None:
        self._buffers, self._launches, self._results = buffers, launches, results

    def play(self, tensors: Sequence[Maybe], device: torch.device) -> tuple[Maybe, ...] | None:
        """The results for other tensors, or None, and nothing done, if their addresses ask for other kernels."""
        addresses = _addresses(tensors)
        if not self._launches or not _are_aligned(addresses):
            return None
        like = next(x for x in tensors if x is not None)
        everything = list(tensors)
        for shape, strides, dtype, zeros in self._buffers:
            made = like.new_empty_strided(shape, strides, dtype=dtype)
            everything.append(made.zero_() if zeros else made)
            addresses.append(made.data_ptr())
        with on_device(device):
            stream = current_stream(device.index or 0)
            for launch in self._launches:
                launch(everything, addresses, stream)
        return tuple([None if place is None else everything[place] for place in self._results])


_NEVER = Recording((), (), ())  # of a call that cannot be played


class Recorder(TorchDispatchMode):
    """Sees a call through; `recording` is then what it did."""

    def __init__(self, tensors: Sequence[Maybe]) -> None:
        super().__init__()
        self._addresses, self._given = _addresses(tensors), len(tensors)
        self._device = next(x.device for x in tensors if x is not None)
        self._made: list[Tensor] = []  # alive, so that no address comes twice
        self._buffers: list[_Buffer] = []
        self._launches: list[Launch] = []
        self._complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _ALLOCATES and name not in _ALLOCATES_ZEROS:
            self._complete = self._complete and func.is_view
        elif result.device == self._device:  # and no stand-in for the sizes of another
            self._made.append(result)
            self._addresses.append(result.data_ptr())
            buffer = _Buffer(tuple(result.shape), result.stride(), result.dtype, name in _ALLOCATES_ZEROS)
            self._buffers.append(buffer)
        return result

    def launch(self, compiled: Any, programs: int, args: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Notes `compiled[(programs, 1, 1)](*arguments, *args)`. An argument that changes is `(address, strides or
        None, descriptor or None)`, any other None. What the interpreter runs is not compiled."""
        self._complete = self._complete and compiled is not None
        places = []
        for position, argument in enumerate(arguments):
            if argument is not None:
                address, strides, descriptor = argument
                if address not in self._addresses:  # of nothing that this saw
                    self._complete = False
                    return
                places.append(Place(position, self._addresses.index(address), strides, descriptor))
        if self._complete:
            self._launches.append(Launch(compiled, programs, [*(None,) * len(arguments), *args], places))

    def recording(self, results: Sequence[Maybe]) -> Recording:
        """What was seen, of a call that gave `results`."""
        places = [None if x is None else self._buffer_of(x) for x in results]
        found = [place for place in places if place is not None]
        if not self._complete or -1 in found or len({*found}) < len(found):
            return _NEVER
        return Recording(self._buffers, self._launches, places)

    def _buffer_of(self, result: Tensor) -> int:
        """The number of a result, whose buffer takes its shape: it may be a view, but of all of the buffer."""
        address = result.data_ptr()
        number = self._addresses.index(address) if address in self._addresses else -1
        if number < self._given or result.numel() != self._made[number - self._given].numel():
            return -1
        here = number - self._given
        self._buffers[here] = self._buffers[here]._replace(shape=tuple(result.shape), strides=result.stride())
        return number


_RECORDINGS: Remembered[Recording] = Remembered()


def recorded(tensors: int, q: int = 0) -> Callable[[Callable[P, Results]], Callable[P, Results]]:
    """Plays calls of a function from recordings: its first arguments are so many tensors (q, k, v from number `q` on,
    the mask last) or None, the others hashable options."""

    def decorate(function: Callable[P, Results]) -> Callable[P, Results]:
        @functools.wraps(function)
        def play_or_run(*args: P.args, **none: P.kwargs) -> Results:
            operands: tuple[Any, ...] = args[:tensors]
            first: Tensor = operands[q]
            given = [x for x in operands if x is not None]
            key = (
                function, args[tensors:], first.shape, operands[q + 1].shape, tuple([x is None for x in operands]),
                schedule.kind_of_product(first.dtype, first.device), torch.are_deterministic_algorithms_enabled(),
            )  # fmt: skip
            recording = _RECORDINGS.find(key, given)
            if recording is not None:
                results: Any = recording.play(operands, first.device)
                return function(*args, **none) if results is None else results
            if not _RECORDINGS.saw(key) or not _may_be_recorded(operands):
                return function(*args, **none)
            with Recorder(operands) as seen:
                _ACTIVE.recorder = seen
                try:
                    results = function(*args, **none)
                finally:
                    _ACTIVE.recorder = None
            _RECORDINGS.keep(key, given, seen.recording(results))
            return results

        return play_or_run

    return decorate


def _may_be_recorded(tensors: Sequence[Maybe]) -> bool:
    """Not inside another recording, and with addresses that tell the tensors apart."""
    given = [x.data_ptr() for x in tensors if x is not None]
    return recorder() is None and 0 not in given and len({*given}) == len(given) and _are_aligned(_addresses(tensors))


def recorder() -> Recorder | None:
    """Of the call that this thread is in, if it is being recorded."""
    return getattr(_ACTIVE, "recorder", None)


def forget() -> None:
    """What decides about launches, such as a table of tiles, has changed."""
    _RECORDINGS.clear()


def _addresses(tensors: Sequence[Maybe]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _are_aligned(addresses: Sequence[int]) -> bool:
    """Of the operands of a call, the mask last."""
    bits = 0
    for address in addresses:
        bits |= address
    return bits % 16 == 0 and addresses[-1] % _MASK_ALIGNMENT == 0
