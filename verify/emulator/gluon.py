"""Runs Gluon kernels written for Hopper GPUs on a CPU, so that their results and their waits can be tested anywhere.

The partitions of a warp-specialised kernel are threads, and barriers block them. What a GPU does asynchronously happens
late here: a product of a warpgroup when a wait asks for it, a copy into shared memory, and many a store there, after a
random delay. So a missing wait, a wrong phase, or a tile that is freed too early gives wrong numbers, an error or a
deadlock, which is found after PATIENCE_SECONDS. Fresh shared memory is NaN. Products of tiles add up in float32, others
are contracted with the sum that they enter. Layouts mean nothing here: only the compiler and the GPU judge them.
"""

import importlib
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flashjvp.kernels.tiles import Operand

from . import assembly
from .contraction import Contracted
from .machine import RUNNING, Barrier, EmulationError, Program, Shared

PACKAGE = "flashjvp.kernels.hopper"
PARTITION = threading.local()


class Product:
    """A product of a warpgroup, computed when a wait asks for it."""

    def __init__(self, a: Tensor | Shared, b: Shared, acc: "Tensor | Product", use_acc: bool) -> None:
        self._a, self._b, self._acc, self._use_acc = a, b, acc, use_acc
        self.result: Tensor | None = None

    def compute(self) -> None:
        a = self._a.data if isinstance(self._a, Shared) else self._a
        result = a.float() @ self._b.data.float()
        if self._use_acc:
            acc = self._acc.result if isinstance(self._acc, Product) else self._acc
            assert acc is not None  # products are computed in order
            result = result + acc
        self.result = result


def _in_flight() -> list[Product]:
    return PARTITION.__dict__.setdefault("products", [])


def warpgroup_mma(
    a: Tensor | Shared, b: Shared, acc: Tensor | Product, *, use_acc: bool = True, is_async: bool = False
) -> Tensor | Product:
    if a.shape[0] != 64 or a.shape[1] != b.shape[0]:
        raise EmulationError(f"a product of {list(a.shape)} and {b.shape}")
    product = Product(a, b, acc, bool(use_acc))
    _in_flight().append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    """What is still in flight stays a Product, with which nothing can be computed."""
    products = _in_flight()
    while len(products) > num_outstanding:
        products.pop(0).compute()
    found = tuple(x.result if isinstance(x, Product) and x.result is not None else x for x in deps)
    return found[0] if len(found) == 1 else found


class Pointer:
    """An address: a tensor's memory and offsets of elements."""

    def __init__(self, memory: Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, offsets

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.memory, self.offsets + getattr(offsets, "value", offsets))  # of a tl.constexpr


class TensorDescriptor:
    """A tensor that is copied tile by tile; beyond its end tiles hold zeros and are not stored."""

    base: Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: list[int]
    layout: object

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def block_type(self) -> SimpleNamespace:
        return SimpleNamespace(nbytes=math.prod(self.block_shape) * self.dtype.itemsize)

    def window(self, first: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of a tile that lies in the tensor, and where that is in the tile. Addresses wrap around."""
        start = [int(x) for x in first]
        stop = [max(x, min(x + b, n)) for x, b, n in zip(start, self.block_shape, self.shape, strict=True)]
        sizes = tuple(y - x for x, y in zip(start, stop, strict=True))
        inside = tuple(slice(0, size) for size in sizes)
        tensor = self.base.detach()
        if 0 in sizes:
            return tensor.new_empty(sizes), inside
        address = sum(x * stride for x, stride in zip(start, self.strides, strict=True)) * tensor.element_size()
        offset = address % (1 << 64) // tensor.element_size()
        if offset >= tensor.untyped_storage().nbytes():
            raise EmulationError(f"a tile at {start} lies outside of the tensor")
        return tensor.as_strided(sizes, tuple(self.strides), tensor.storage_offset() + offset), inside


def _load_tile(desc: TensorDescriptor, coord: Sequence[Any], barrier: Shared, tile: Shared) -> None:
    if tile.shape != desc.block_shape[-4:]:
        raise EmulationError(f"a tile {desc.block_shape} copied into {tile.shape}")
    source, inside = desc.window(coord)

    def copy() -> None:
        tile.data.zero_()
        tile.data[(None,) * (source.ndim - tile.data.ndim)][inside] = source
        barrier.barriers[0].land(desc.block_type.nbytes)

    RUNNING[-1].later(copy)


def _store_tile(desc: TensorDescriptor, coord: Sequence[Any], tile: Shared) -> None:
    destination, inside = desc.window(coord)
    destination.copy_(tile.data[(None,) * (destination.ndim - tile.data.ndim)][inside])


def _warp_specialize(partitions: Sequence[tuple[Any, Any]], warps: object, registers: object) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            with Contracted():
                function(*arguments)
        except BaseException as error:  # raised again below
            errors.append(error)
            RUNNING[-1].failed = True

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
    if layout == "barriers":
        return Shared(None, [Barrier() for _ in range(shape[0])])
    return Shared(torch.full(tuple(shape), math.nan, dtype=dtype))


def _load(pointer: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    memory, offsets = pointer.memory.view(-1), pointer.offsets
    if mask is None:
        return memory[offsets]
    found = torch.full(offsets.shape, other, dtype=memory.dtype)
    mask = mask.expand(offsets.shape)
    found[mask] = memory[offsets[mask]]
    return found


def _store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    mask = torch.ones_like(pointer.offsets, dtype=torch.bool) if mask is None else mask
    pointer.memory.view(-1)[pointer.offsets[mask]] = value[mask]


def _atomic_add(pointer: Pointer, value: Tensor, sem: str) -> None:
    with RUNNING[-1].atomics:
        pointer.memory.view(-1).index_add_(0, pointer.offsets.expand(value.shape).reshape(-1), value.reshape(-1))


def _static_assert(condition: bool) -> None:
    if not condition:
        raise EmulationError("a static assertion failed")


def _passed(x: Any) -> Any:
    """An argument as a kernel gets it. The memory of an Operand goes on beyond the tensor's numbers."""
    if isinstance(x, Operand):
        rest = x.ptr.untyped_storage().nbytes() // x.ptr.element_size() - x.ptr.storage_offset()
        return x._replace(ptr=Pointer(x.ptr.detach().as_strided((rest,), (1,))))
    return Pointer(x.detach()) if isinstance(x, Tensor) else x


class Kernel:
    """A function that @gluon.jit made; launched, it runs program after program."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = self._function = function
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, launch_pdl: bool = False, **values: Any) -> None:
            passed = [_passed(x) for x in args]
            for number in range(grid[0]):
                program = Program(number, grid[0])
                RUNNING.append(program)
                try:
                    self._function(*passed, **values)
                finally:
                    program.end()
                    RUNNING.pop()

        return launch


def _modules() -> dict[str, ModuleType]:
    """What stands in for Gluon."""

    def module(name: str, **contents: object) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(contents)
        return made

    def layout(*arguments: object, **keywords: object) -> str:
        return "layout"

    language = module(
        "language",
        constexpr=lambda value: value, static_range=range, static_assert=_static_assert, cdiv=lambda a, b: -(-a // b),
        program_id=lambda axis: torch.tensor(RUNNING[-1].number), arange=lambda a, b, layout: torch.arange(a, b),
        num_programs=lambda axis: torch.tensor(RUNNING[-1].count), shared_memory_descriptor=Shared,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        where=lambda condition, x, y: torch.where(condition, x, torch.as_tensor(y, dtype=x.dtype)), exp2=torch.exp2,
        minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
        maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), log2=torch.log2,
        convert_layout=lambda x, layout: x, split=lambda x: x.unbind(-1), join=lambda x, y: torch.stack((x, y), -1),
        multiple_of=lambda x, values: x, cast=lambda x, dtype: x, load=_load, store=_store,
        atomic_add=_atomic_add, allocate_shared_memory=_allocate, inline_asm_elementwise=assembly.run,
        warp_specialize=_warp_specialize, NVMMADistributedLayout=layout, SliceLayout=layout, DotOperandLayout=layout,
        NVMMASharedLayout=layout, DistributedLinearLayout=layout, SwizzledSharedLayout=layout, BlockedLayout=layout,
        float32=torch.float32, int32=torch.int32, int64=torch.int64, bfloat16=torch.bfloat16,
    )  # fmt: skip
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda barrier, count: barrier.barriers[0].init(count),
        expect=lambda barrier, size: barrier.barriers[0].arrive(1, size),
        arrive=lambda barrier, count: barrier.barriers[0].arrive(count),
        wait=lambda barrier, phase: barrier.barriers[0].wait(int(phase)),
    )
    tma = SimpleNamespace(async_load=_load_tile, async_store=_store_tile, store_wait=lambda pendings: None)
    tma.async_copy_global_to_shared, tma.async_copy_shared_to_global = _load_tile, _store_tile  # before Triton 3.8
    products = {"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait}
    hopper = module("hopper", fence_async_shared=lambda: None, mbarrier=mbarrier, tma=tma, **products)
    gluon = module(
        "gluon", jit=lambda function=None, **options: Kernel if function is None else Kernel(function),
        constexpr_function=lambda function: function, language=language,
    )  # fmt: skip
    root = "triton.experimental"
    return {
        root: module("experimental", gluon=gluon),
        f"{root}.gluon": gluon,
        f"{root}.gluon.language": language,
        f"{root}.gluon.language.nvidia": module("nvidia"),
        f"{root}.gluon.language.nvidia.hopper": hopper,
        "triton.language.extra.cuda": module("cuda", gdc_wait=lambda: None, gdc_launch_dependents=lambda: None),
        f"{root}.gluon.nvidia": module("nvidia"),
        f"{root}.gluon.nvidia.hopper": module("hopper", TensorDescriptor=TensorDescriptor),
    }


@contextmanager
def emulated() -> Iterator[None]:
    """In this block the warp-specialised kernels of flashjvp run here, on CPU tensors."""
    importlib.import_module(PACKAGE)
    ours = _forget()
    theirs = {name: sys.modules.get(name) for name in _modules()}
    try:
        sys.modules.update(_modules())
        importlib.import_module(PACKAGE + ".wide_launch")
        _put_back(theirs)  # Triton itself needs the true ones
        yield
    finally:
        _forget()
        _put_back(theirs | ours)


def _forget() -> dict[str, ModuleType | None]:
    """Takes our kernels out of the imported modules."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PACKAGE)}


def _put_back(modules: Mapping[str, ModuleType | None]) -> None:
    for name, module in modules.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
