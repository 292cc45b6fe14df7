"""Capture and replay of calls: which tensors to allocate, which kernels to launch, and which tensors are the results.

All else that a call does in Python follows from sizes, strides, types and options. A captured call is of one such set,
for addresses that 16 bytes divide. During capture a dispatch mode sees every operator that runs: a call that does more
than allocate, view and launch is not captured. A captured call holds no tensor. A call that lacks several kernels
compiles them side by side.
"""

import functools
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ... import _torch
from ..._torch.guards import TensorKeyedCache
from . import schedule
from .compilation import THREAD, Missing, compile_all, kernels_of
from .driver import Launch, Place, current_stream, index_of, is_current, is_hooked

Maybe = Tensor | None
Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
P = ParamSpec("P")
Results = TypeVar("Results", bound=tuple[Maybe, ...])
Found = TypeVar("Found")

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


class CapturedCall:
    """What a call does, but for addresses."""

    def __init__(
        self, device: torch.device, buffers: Sequence[_Buffer], launches: Sequence[Launch],
        results: Sequence[int | None], mask: int,
    ) -> None:  # fmt: skip
        self._mask = mask  # its place among the tensors
        self._index, self._buffers, self._launches = index_of(device), buffers, launches
        self._allocate = _allocator(device)
        # of the tensors and buffers, after which there is a None
        self._results = operator.itemgetter(*[-1 if place is None else place for place in results])

    def replay(self, tensors: Sequence[Maybe]) -> tuple[Maybe, ...] | None:
        """The results for other tensors, or None, and nothing done, if their addresses ask for other kernels."""
        addresses = _addresses(tensors)  # mutate: addresses
        if not self._launches or not _are_aligned(addresses, self._mask):  # mutate: if self _launches
            return None
        if is_current(self._index):
            return self._replay([*tensors], addresses)
        with torch.cuda.device(self._index):
            return self._replay([*tensors], addresses)

    def _replay(self, tensors: list[Maybe], addresses: list[int]) -> tuple[Maybe, ...]:
        """The same on the current device. Buffers join the tensors and their addresses, as in the Capture."""
        allocate = self._allocate
        for shape, strides, dtype, zeros in self._buffers:
            made = allocate(shape, strides, dtype)
            if zeros:
                made.zero_()  # mutate: made.zero_
            tensors.append(made)
            addresses.append(made.data_ptr())
        stream, hooked = current_stream(self._index or 0), is_hooked()
        for launch in self._launches:
            launch(tensors, addresses, stream, hooked)
        tensors.append(None)
        results: tuple[Maybe, ...] = self._results(tensors)
        return results


def _allocator(device: torch.device) -> Allocate:
    """Gives unwritten memory of the current device. The dispatcher's way is for deterministic mode, which calls
    are captured for or not: there PyTorch fills it, so that what is never written shows."""
    directly: Allocate | None = _torch.EMPTY_STRIDED.get(device.type)
    if directly is not None and not torch.are_deterministic_algorithms_enabled():
        return directly
    # mutate: return shape strides
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


_NEVER = CapturedCall(torch.device("cpu"), (), (), (None, None), 0)  # of a call that cannot be replayed


class Capture(_torch.TorchDispatchMode or object):
    """Sees a call through; `finish` then gives what it did."""

    def __init__(self, tensors: Sequence[Maybe], mask: int) -> None:
        super().__init__()
        self._mask = mask
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
                # mutate: places.append
                places.append(Place(position, self._addresses.index(address), strides, descriptor))
        if self._complete:
            self._launches.append(Launch(compiled, programs, [*(None,) * len(arguments), *args], places))

    def finish(self, results: Sequence[Maybe]) -> CapturedCall:
        """What was seen, of a call that gave `results`."""
        places = [None if x is None else self._buffer_of(x) for x in results]
        found = [place for place in places if place is not None]
        if not self._complete or -1 in found or len({*found}) < len(found):
            return _NEVER
        return CapturedCall(self._device, self._buffers, self._launches, places, self._mask)

    def _buffer_of(self, result: Tensor) -> int:
        """The number of a result, whose buffer takes its shape: it may be a view, but of all of the buffer."""
        address = result.data_ptr()
        number = self._addresses.index(address) if address in self._addresses else -1
        if number < self._given or result.numel() != self._made[number - self._given].numel():
            return -1
        here = number - self._given
        self._buffers[here] = self._buffers[here]._replace(shape=tuple(result.shape), strides=result.stride())
        return number


_CAPTURED: TensorKeyedCache[CapturedCall] = TensorKeyedCache()


def captured(record: type[Any]) -> Callable[[Callable[P, Results]], Callable[P, Results]]:
    """Replays calls of a function from earlier ones. Its first arguments are the tensors of a record of operands.py,
    the others hashable options. Its `bind` is a `Bound`, of tensors and options."""
    count, mask = len(record._fields), record._fields.index("mask")
    q_and_k = operator.itemgetter(record._fields.index("q"), record._fields.index("k"))

    def decorate(function: Callable[P, Results]) -> Callable[P, Results]:
        def kept(
            tensors: Sequence[Any], options: tuple[Any, ...]
        ) -> tuple[Hashable, list[Tensor], CapturedCall | None]:
            """A captured call of tensors like these, and what it is or may be kept by."""
            q, k = q_and_k(tensors)
            given = [x for x in tensors if x is not None]
            pattern = tuple([x is None for x in tensors])
            # mutate: key
            key = function, options, q.shape, k.shape, pattern, _state(q.dtype, q.device)
            with _torch.below_autograd():  # guards compare that, too, and not all callers are there
                return key, given, _CAPTURED.find(key, given)

        @functools.wraps(function)
        def replay_or_run(*args: P.args, **none: P.kwargs) -> Results:
            if THREAD.collected is not None:
                return function(*args, **none)
            tensors: tuple[Any, ...] = args[:count]
            key, given, known = kept(tensors, args[count:])
            if known is not None:
                results: Any = known.replay(tensors)
                return function(*args, **none) if results is None else results
            if not _CAPTURED.saw(key) or not _may_be_captured(tensors, mask):
                return function(*args, **none)
            with Capture(tensors, mask) as seen:
                _ACTIVE.capture = seen
                try:
                    results = function(*args, **none)
                finally:
                    _ACTIVE.capture = None
            with _torch.below_autograd():
                _CAPTURED.keep(key, given, seen.finish(results))
            return results

        def bind(operands: Any, options: tuple[Any, ...]) -> Bound:
            q: Tensor = operands.q

            def captured_call(tensors: Sequence[Maybe]) -> CapturedCall | None:
                _, _, known = kept(tensors, options)
                return known

            return Bound(replay_or_run, captured_call, options, q.dtype, q.device)

        replay_or_run.bind = bind  # type: ignore[attr-defined]
        return replay_or_run

    return decorate


def side_by_side(function: Callable[P, Found]) -> Callable[P, Found]:
    """Compiles what a function launches and is not compiled yet, all of it at the same time, before it runs.

    The function allocates and launches, and does nothing else that may not be done twice.
    """

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> Found:
        if THREAD.may_break_off or THREAD.collected is not None:
            return function(*args, **options)  # the function around this one sees to it
        THREAD.may_break_off = True
        try:
            return function(*args, **options)
        except Missing:
            pass
        finally:
            THREAD.may_break_off = False
        compile_all(kernels_of(function, *args, **options))
        return function(*args, **options)

    return run


class Bound:
    """A captured function with its options, of tensors that are like one another: whoever calls it has compared them,
    so that their captured call is looked up once."""

    def __init__(
        self, function: Callable[..., Any], kept: Callable[[Sequence[Maybe]], CapturedCall | None],
        options: tuple[Any, ...], dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._function, self._kept, self._options, self._dtype, self._device = function, kept, options, dtype, device
        # The captured call, after what it is good for. Replaced as a whole: threads share it.
        self._latest: tuple[object, CapturedCall | None] = None, None

    def __call__(self, tensors: Sequence[Maybe]) -> Any:
        state = _CAPTURED, _state(self._dtype, self._device)
        known_state, known = self._latest
        if known is None or known_state != state:
            if (known := self._kept(tensors)) is None:
                return self._function(*tensors, *self._options)
            self._latest = state, known
        results = known.replay(tensors)
        return self._function(*tensors, *self._options) if results is None else results


def _state(dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    """What else than tensors and options decides about kernels."""
    return schedule.input_precision(dtype, device), torch.are_deterministic_algorithms_enabled()


def _may_be_captured(tensors: Sequence[Maybe], mask: int) -> bool:
    """Not inside another capture, and with addresses that tell the tensors apart."""
    given = [x.data_ptr() for x in tensors if x is not None]
    if _torch.TorchDispatchMode is None:
        return False
    return (
        active_capture() is None
        and 0 not in given
        and len({*given}) == len(given)
        and _are_aligned(_addresses(tensors), mask)
    )


def active_capture() -> Capture | None:
    """Of the call that this thread is in, if it is being captured."""
    return getattr(_ACTIVE, "capture", None)


def forget() -> None:
    """What decides about launches, such as a table of tiles, has changed."""
    global _CAPTURED
    _CAPTURED = TensorKeyedCache()  # another object, so that a `Bound` notices


def _addresses(tensors: Sequence[Maybe]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _are_aligned(addresses: Sequence[int], mask: int) -> bool:
    """Of the operands of a call, with the place of the mask."""
    return functools.reduce(operator.or_, addresses) % 16 == 0 and addresses[mask] % _MASK_ALIGNMENT == 0
