"""Launches a compiled kernel again with other addresses, by calling the C function that Triton built for it.

Triton's own launcher is Python and encodes every TMA descriptor anew. Here encoded descriptors are cached, by address
and geometry. Every private name of Triton stands in this file, as Triton 3.6 to 3.9 have it. Where one is missing, or a
launch hook is set, the launch goes through Triton's public interface.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ... import _torch, environment

_NVIDIA = "triton.backends.nvidia.driver"
# geometry -> descriptors of it, by address
_ENCODERS: dict[str, "_Encoder"] = environment.kept({})
_MOST_GEOMETRIES = 1 << 10
_MOST_ENCODED = 1 << 10  # of one geometry
_HERE = nullcontext()


class Place(NamedTuple):
    """A kernel argument that changes: the address of tensor number `source`, alone, with strides or in a descriptor."""

    position: int
    source: int
    strides: tuple[int, ...] | None = None
    descriptor: Any = None


class Launch:
    """`compiled[(programs, 1, 1)](*args)`, with the arguments at `places` made from the tensors of each call."""

    def __init__(self, compiled: Any, programs: int, args: Sequence[Any], places: Sequence[Place]) -> None:
        self._compiled, self._programs, self._args = compiled, programs, list(args)
        # without the tensors of the first call
        self._places = [place._replace(descriptor=_without_base(place.descriptor)) for place in places]
        for place in places:
            self._args[place.position] = None
        self._direct = _direct(compiled, programs, self._args, self._places)

    def __call__(
        self, tensors: Sequence[Tensor | None], addresses: Sequence[int], stream: int, hooked: bool
    ) -> None:  # fmt: skip
        if self._direct is None or hooked:
            self._public(tensors, addresses)
        else:
            self._direct(addresses, stream)

    def _public(self, tensors: Sequence[Tensor | None], addresses: Sequence[int]) -> None:
        args = self._args.copy()
        for position, source, strides, descriptor in self._places:
            if descriptor is not None:
                args[position] = _with_base(descriptor, tensors[source])
            else:
                args[position] = addresses[source] if strides is None else (addresses[source], strides)
        self._compiled[(self._programs, 1, 1)](*args)


def current_stream(device: int) -> int:
    """What Triton launches on."""
    stream: int = driver.active.get_current_stream(device)
    return stream


def index_of(device: torch.device) -> int | None:
    """The number of a GPU, None for a CPU. To be asked once: PyTorch makes a string of a device's type each time."""
    return device.index if device.type == "cuda" else None


def is_current(index: int | None) -> bool:
    """Whether the device with this index is the current one, on which Triton launches and memory is allocated."""
    return index is None or index == _torch.current_cuda_device()


def on_device(index: int | None) -> AbstractContextManager[object]:
    """Makes the device with this index the current one."""
    return _HERE if is_current(index) else torch.cuda.device(index)


def is_hooked() -> bool:
    """Whether a launch hook of Triton is set, which its public launch calls. To be asked once for all launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _direct(
    compiled: Any, programs: int, args: Sequence[Any], places: Sequence[Place]
) -> Callable[[Sequence[int], int], None] | None:
    """Launches from addresses and a stream; None where this Triton lacks a name that it needs."""
    try:
        launcher = compiled.run
        if type(launcher).__module__ != _NVIDIA or getattr(launcher, "gsan_enabled", False):
            return None
        if launcher.global_scratch_size or launcher.profile_scratch_size:  # allocated for each launch
            return None
        head, nested = _given_to_c(launcher, programs, compiled)
        launch = launcher.launch
        if inspect.isfunction(launch):  # what encodes descriptors and goes on to C
            launch = inspect.getclosurevars(launch).nonlocals["launcher"]
        encoders = _encoders(compiled, head, nested, places)
        return _Direct(launch, head, nested, args, places, encoders)
    except (AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError):
        return None


_STREAM = object()


def _given_to_c(launcher: Any, programs: int, compiled: Any) -> tuple[tuple[Any, ...], bool]:
    """What Triton passes to C before the kernel's arguments, and whether those are one tuple."""
    given: list[tuple[Any, ...]] = []
    copied = object.__new__(type(launcher))
    copied.__dict__.update(launcher.__dict__, launch=lambda *all_args: given.append(all_args))
    mark = object()
    copied(programs, 1, 1, _STREAM, compiled.function, compiled.packed_metadata, None, None, None, mark)
    (*head, last) = given[0]
    if last is not mark and last != (mark,):
        raise ValueError("the kernel's arguments are not where this file knows them")
    return tuple(head), last is not mark


class _Direct:
    """Fills in a list of arguments for C and launches."""

    def __init__(
        self, launch: Callable[..., None], head: tuple[Any, ...], nested: bool, args: Sequence[Any],
        places: Sequence[Place], encoders: dict[int, "_Encoder"],
    ) -> None:  # fmt: skip
        self._launch, self._nested = launch, nested
        self._stream = head.index(_STREAM)
        self._before = list(head)
        self._values: list[Any] = [] if nested else list(head)
        self._addresses: list[tuple[int, int, tuple[int, ...] | None]] = []
        self._described: list[tuple[int, int, _Encoder]] = []
        changing = {place.position: place for place in places}
        for position, value in enumerate(args):
            place, here = changing.get(position), len(self._values)
            if place is None:
                self._values.append(value)
            elif place.descriptor is None:
                self._addresses.append((here, place.source, place.strides))
                self._values.append(None)
            else:
                self._described.append((here, place.source, encoders[position]))
                self._values += [None, *place.descriptor.shape, *place.descriptor.strides]

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        values = self._values.copy()
        for position, source, strides in self._addresses:
            # mutate: values[position] (1)
            values[position] = addresses[source] if strides is None else (addresses[source], strides)
        for position, source, encoder in self._described:
            values[position] = encoder[addresses[source]]  # mutate: values[position] (2)
        if self._nested:
            before = self._before.copy()
            before[self._stream] = stream
            self._launch(*before, values)
        else:
            values[self._stream] = stream
            self._launch(*values)


class _Encoder(dict[int, Any]):
    """Encoded descriptors of one geometry by address, each made when it is asked for. They do not own the memory."""

    def __init__(self, descriptor: Any, signature: str, meta: Any, head: tuple[Any, ...], nested: bool) -> None:
        super().__init__()
        self._descriptor, self._head, self._nested = descriptor, head, nested
        wrap = sys.modules[_NVIDIA].wrap_handle_tensordesc
        self._expand = wrap(lambda *args: args[-1] if nested else args[len(head) :], {0: signature}, [meta])

    def __missing__(self, address: int) -> Any:
        described = _with_base(self._descriptor, _Address(address))
        encoded, *rest = self._expand(*self._head, (described,) if self._nested else described)
        if type(encoded).__name__ != "PyCUtensorMap" or rest != [*described.shape, *described.strides]:
            raise TypeError(f"expected an encoded descriptor, its shape and strides, got {encoded}, {rest}")
        if len(self) >= _MOST_ENCODED:
            self.clear()
        self[address] = encoded
        return encoded


def _encoders(compiled: Any, head: tuple[Any, ...], nested: bool, places: Sequence[Place]) -> dict[int, _Encoder]:
    """By position, for the arguments that are descriptors."""
    described = [place for place in places if place.descriptor is not None]
    signatures = [x for x in compiled.src.signature.values() if isinstance(x, str) and x.startswith("tensordesc")]
    metas = compiled.metadata.tensordesc_meta if described else []
    if not len(described) == len(signatures) == len(metas) or None in metas:
        raise ValueError("the kernel does not take as many encoded descriptors as there are")
    encoders = {}
    for (position, _, _, descriptor), signature, meta in zip(described, signatures, metas, strict=True):
        geometry = repr((descriptor.shape, descriptor.strides, signature, meta))  # mutate: geometry
        if geometry not in _ENCODERS:
            if len(_ENCODERS) >= _MOST_GEOMETRIES:
                _ENCODERS.clear()
            _ENCODERS[geometry] = _Encoder(descriptor, signature, meta, head, nested)
        encoders[position] = _ENCODERS[geometry]
    return encoders


class _Address(int):
    """An address in the place of a tensor."""

    def data_ptr(self) -> int:
        return int(self)


def _without_base(descriptor: Any) -> Any:
    return None if descriptor is None else _with_base(descriptor, None)


def _with_base(descriptor: Any, base: Any) -> Any:
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__, base=base)
    return made
