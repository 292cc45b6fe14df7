"""A stand-in for a jitted kernel, and the tensors that launches of it are given.

Meta tensors have strides and sizes that no memory here could hold.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WIDTH = 64


class Kernel:
    """Stands for a jitted kernel: counts compilations and keeps what launches of the compiled kernels were given."""

    sizes: tuple[str, ...] = ("scale", "batch_shape", "M", "N", "heads", "group")
    constants: tuple[str, ...] = ("K_COLUMNS", "V_COLUMNS", "TILE", "CAUSAL", "MASK_LAYOUT", "PRECISION", "REGULAR")

    def __init__(self, compiles: bool = True) -> None:
        self.fn = object()
        self.arg_names = ("q", "lse", *self.sizes, *self.constants)
        self.compilations: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self._compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self.compilations.append((grid, args, options))
            return Compiled(self) if self._compiles else None

        return run


class WarpSpecialisedKernel(Kernel):
    """One whose tensors come as descriptors, with strides of their own."""

    sizes = ("scale", "M", "N", "heads", "group")
    constants = ("JVP", "CAUSAL", "STAGES")


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self._kernel.launches.append((grid, args))


def rows(length: int = 32, heads: int = 2, width: int = WIDTH, row: int = 0, batch: int = 1, **options: Any) -> Tensor:
    """[batch, heads, length, width] with rows `row` elements apart (`width` by default)."""
    row = row or width
    strides = (heads * length * row, length * row, row, 1)
    options = {"dtype": torch.bfloat16, "device": "meta", **options}
    return torch.empty_strided((batch, heads, length, width), strides, **options)


def on_cpu(offset: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[1, 2, 32, WIDTH] that starts `offset` elements after an address that 16 divides."""
    memory = torch.empty(2 * 32 * WIDTH + 64, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[offset : offset + 2 * 32 * WIDTH].view(1, 2, 32, WIDTH)


def statistic(offset: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(1, 2, 40, dtype=dtype).view(-1)[offset : offset + 64].view(1, 2, 32)
