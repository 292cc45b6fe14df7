"""Lets a CPU stand in for a GPU in capture and replay: kernels run in the interpreter or emulator, as if compiled.

A launch is captured only if its kernel was compiled, and a kernel that the interpreter runs never is. Here the first
launch gives a compiled kernel: Triton's own classes around a stand-in for the launch function in C, which takes what
that function takes: addresses, strides and encoded descriptors. It runs the kernel on the memory that these name, with
the types of the first launch. Addresses that 16 divided at the first launch are taken for multiples of 16, as wide
loads take them.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from .gluon import TensorDescriptor


class PyCUtensorMap:
    """Stands for an encoded descriptor: address, swizzle, element size and type, tile, shape, strides, padding."""

    def __init__(self, address: int, *what: Any) -> None:
        self.address, (_, _, _, self.block_shape, self.shape, self.strides, *_) = address, what


class Compiling:
    """A kernel whose first launch gives a compiled one."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self.fn = kernel, kernel
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, num_warps: int, **options: Any) -> Any:
            with _disable_current_modes():  # what stands for the GPU is no part of the call
                self._kernel[grid](*args, num_warps=num_warps, **options)
            given = [*args, *(options[name] for name in self.arg_names[len(args) :])]
            options = {name: value for name, value in options.items() if name not in self.arg_names}
            return _compiled(lambda grid, args: self._kernel[grid](*args, num_warps=num_warps, **options), given)

        return launch


class C:
    """Stands for the launch function in C, of a kernel that was first launched with arguments `first`."""

    def __init__(self, run: Callable[[tuple[int], list[Any]], None], first: Sequence[Any]) -> None:
        self._run, self._first = run, first
        self._count = sum(1 + (2 * len(x.shape) if isinstance(x, TensorDescriptor) else 0) for x in first)

    def __call__(self, programs: int, *given: Any) -> None:
        """The kernel's arguments come last, side by side or as one tuple; what comes before them is Triton's."""
        is_nested = isinstance(given[-1], tuple | list) and len(given[-1]) == self._count
        values = iter(given[-1] if is_nested else given[-self._count :])
        with _disable_current_modes():
            self._run((programs,), [_argument(x, values) for x in self._first])


def _compiled(run: Callable[[tuple[int], list[Any]], None], first: Sequence[Any]) -> Any:
    """The kernel of a launch with arguments `first`; `run` takes a grid and such arguments."""
    signature, metas = {}, []
    for name, x in enumerate(first):
        signature[str(name)] = "i32"
        if isinstance(x, TensorDescriptor):
            signature[str(name)] = f"tensordesc<{x.dtype}{x.block_shape},L>"
            size = {"elem_size": x.dtype.itemsize, "elem_type": 0, "block_size": x.block_shape}
            metas.append({"swizzle": 0, "fp4_padded": False, **size})
    launcher = object.__new__(nvidia.CudaLauncher)
    sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size", "global_scratch_align"), 0)
    sizes |= {"profile_scratch_align": 0, "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
    vars(launcher).update(sizes, gsan_enabled=False, arg_annotations="annotations", kernel_signature="signature")
    launcher.launch = nvidia.wrap_handle_tensordesc(C(run, first), signature, metas)
    kernel = object.__new__(CompiledKernel)
    vars(kernel).update(
        module="module", _module_pid=-1, _run=launcher, function=0, packed_metadata=(), name="kernel",
        src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(tensordesc_meta=metas),
    )  # fmt: skip
    return kernel


def _argument(first: Any, values: Iterator[Any]) -> Any:
    """An argument as the interpreter and the emulator take it, from what C is given for it."""
    value = next(values)
    if isinstance(first, TensorDescriptor):
        for _ in (*first.shape, *first.strides):
            next(values)
        made = object.__new__(TensorDescriptor)
        base = first.base
        extent = 1 + sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
        described = {"shape": value.shape, "strides": value.strides, "block_shape": value.block_shape}
        vars(made).update(vars(first), base=_memory(base, value.address, extent), **described)
        return made
    if isinstance(first, Tensor):
        return _memory(first, value.data_ptr() if isinstance(value, Tensor) else value, first.numel())
    if isinstance(value, tuple) and isinstance(getattr(first, "ptr", None), Tensor):
        return type(first)(_memory(first.ptr, value[0], 1), value[1])
    return value


def _memory(first: Tensor, address: int, extent: int) -> Tensor:
    """So many elements at an address, of the type that stood there at the first launch."""
    if first.data_ptr() % 16 == 0:
        address -= address % 16
    buffer = (ctypes.c_byte * (extent * first.element_size())).from_address(address)
    return torch.frombuffer(buffer, dtype=first.dtype)


@contextmanager
def compiling() -> Iterator[list[str]]:
    """In this block every launch of flashjvp compiles. Yields a list with one word for each call that was replayed."""
    from flashjvp import environment
    from flashjvp.kernels.launch import replaced, replay

    replayed: list[str] = []
    known: dict[int, Compiling] = {}
    original = replay.CapturedCall.replay

    def compiled(launch: Callable[..., None], call: Any, kernel: Any, *args: Any, **options: Any) -> None:
        launch(call, known.setdefault(id(kernel), Compiling(kernel)), *args, **options)

    def replay_and_count(captured: Any, *args: Any) -> Any:
        results = original(captured, *args)
        replayed.extend([] if results is None else ["replayed"])
        return results

    utils = SimpleNamespace(fill_tma_descriptor=PyCUtensorMap, fill_tma_descriptor_tiled=PyCUtensorMap)
    stand_in = SimpleNamespace(utils=utils, get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    before = vars(driver).copy()
    driver.set_active(stand_in)
    environment.forget()  # what was compiled before
    try:
        with (
            replaced.launch(compiled),
            patch.object(replay.CapturedCall, "replay", replay_and_count),
            patch.multiple(TensorDescriptor, create=True, padding="zero", round_f32_to_tf32=False),
        ):
            yield replayed
    finally:
        vars(driver).clear()
        vars(driver).update(before)
        environment.forget()
