"""What every launcher needs: the geometry of a call, operands of the kernels, tile lookup and the launch itself."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import schedule
from .tiles import Operand, odd

Maybe = Tensor | None

# What Triton compiled for each kernel, device, constants and specialization of the arguments: finding it here costs a
# tenth of finding it by Triton's own means.
_COMPILED: dict[tuple[object, ...], Any] = {}


class Argument(NamedTuple):
    """An argument of a kernel: as Triton compiles for it, as a launch takes it, and what of it Triton specializes on.

    A launch takes addresses in place of tensors and need not ask the driver about them.
    """

    operand: Operand | Tensor
    raw: object
    special: tuple[object, ...]


class Call:
    """One attention call on the triton backend: sizes and alignment of its tensors, and how to launch on them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, is_causal: bool) -> None:
        *batch, heads, m, d = q.shape
        kv_heads, n, dv = k.shape[-3], k.shape[-2], v.shape[-1]
        self.is_empty = q.numel() == 0
        self.device, self.is_causal = q.device, is_causal
        self.kind = schedule.kind_of_product(q.dtype, q.device)
        self.batch_shape = tuple(odd(size) for size in reversed(batch)) or (odd(1),)
        self.programs = 1
        for size in batch:
            self.programs *= size
        self.sizes = (m, n, heads, heads // max(kv_heads, 1))
        self.kv_heads = kv_heads
        self.k_columns = (d, *schedule.chunk_widths(d, self.kind))
        self.v_columns = (dv, *schedule.chunk_widths(dv, self.kind))
        self.width = max(sum(self.k_columns[1:]), sum(self.v_columns[1:]))
        self._address_bits = self._row_stride = 0
        self._arguments: dict[int, tuple[Tensor, Argument]] = {}
        self.mask, self.mask_layout = self._mask_operand(mask, (*q.shape[:-1], n))

    def operands(self, *tensors: Maybe) -> tuple[Argument | None, ...]:
        """Kernel arguments. A tensor whose last dim is not contiguous is copied: the one copy of this backend."""
        return tuple([None if x is None else self._operand(x) for x in tensors])

    def _operand(self, x: Tensor) -> Argument:
        found = self._arguments.get(id(x))
        if found is not None:
            return found[1]
        given = x
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            x = x.contiguous()
        strides, bits, row, special = _layout(x.stride())
        address = x.data_ptr()
        self._address_bits |= bits * x.element_size() | address
        self._row_stride = max(self._row_stride, row)
        argument = Argument(Operand(x, strides), (address, strides), (x.dtype, address % 16 == 0, special))
        self._arguments[id(x)] = self._arguments[id(given)] = given, argument  # alive, so that ids stay theirs
        return argument

    def _mask_operand(self, mask: Maybe, shape: tuple[int, ...]) -> tuple[Argument | None, tuple[int, bool]]:
        """The mask, copied only where its last dim is strided, and the MASK_LAYOUT of `tiles.apply_mask`."""
        if mask is None:
            return None, (0, False)
        column = int(mask.shape[-1] != 1)
        if column and mask.stride(-1) != 1:
            mask = mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        strides, bits, row, special = _layout(mask.expand(shape).stride())
        address = mask.data_ptr()
        bits |= address // mask.element_size() | shape[-1]
        aligned = column == 1 and bits % 16 == 0 and row < 1 << 23
        argument = Argument(Operand(mask, strides), (address, strides), (mask.dtype, address % 16 == 0, special))
        return argument, (column, aligned)

    def query_programs(self, tile: schedule.Tile) -> int:
        """Programs of a kernel that owns tiles of query rows."""
        return self.programs * self.sizes[2] * -(-self.sizes[0] // tile.block_m)

    def key_programs(self, tile: schedule.Tile) -> int:
        """Programs of a kernel that owns tiles of key rows."""
        return self.programs * self.kv_heads * -(-self.sizes[1] // tile.block_n)

    def launch(
        self, kernel: Any, family: str, programs: Callable[[schedule.Tile], int], args: Sequence[Any], scale: float
    ) -> None:
        """Runs `kernel(*args, scale, batch_shape, *sizes, ...)` with the tile that schedule.py holds for `family`."""
        tile = schedule.lookup(self.device, self.kind, family, self.width)
        constants = (
            self.k_columns,
            self.v_columns,
            (tile.block_m, tile.block_n),
            self.is_causal,
            self.mask_layout,
            "tf32" if self.kind == "tf32" else "ieee",
            self._address_bits % 16 == 0 and self._row_stride < 1 << 23,
        )
        sizes = (scale, self.batch_shape, *self.sizes, *constants)
        arguments = [x if x is None or isinstance(x, Argument) else _statistic(x) for x in args]
        key = (
            kernel.fn, self.device, tile, constants, self.sizes[3], _widths((*self.batch_shape, *self.sizes)),
            tuple([None if x is None else x.special for x in arguments]),
        )  # fmt: skip
        compiled = _COMPILED.get(key)
        with _current(self.device):
            if compiled is not None:
                compiled[(programs(tile), 1, 1)](*[None if x is None else x.raw for x in arguments], *sizes)
                return
            operands = [None if x is None else x.operand for x in arguments]
            compiled = kernel[(programs(tile),)](*operands, *sizes, num_warps=tile.warps, num_stages=tile.stages)
        if compiled is not None:  # the interpreter compiles nothing
            _COMPILED[key] = compiled


def _statistic(x: Tensor) -> Argument:
    """A row statistic, which is contiguous."""
    address = x.data_ptr()
    return Argument(x, address, (x.dtype, address % 16 == 0))


@lru_cache(1 << 14)
def _layout(strides: tuple[int, ...]) -> tuple[tuple[int, ...], int, int, tuple[object, ...]]:
    """Of [*batch, head, row, column] strides: Operand.strides (without batch dims, one of 0), the bits that any stride
    but the column's has, the row's stride, and what Triton specializes on: a row stride of 1 or a multiple of 16, and
    which integers are long."""
    *batch, head, row, _ = strides
    packed = (row, odd(head), *(map(odd, reversed(batch)) if batch else (odd(0),)))
    bits = 0
    for stride in strides[:-1]:
        bits |= stride
    return packed, bits, row, (row == 1, row % 16 == 0, _widths(packed))


@lru_cache(1 << 14)
def _widths(integers: tuple[int, ...]) -> tuple[bool, ...]:
    """Which integers need 64 bits, and so their number."""
    return tuple([x >= 1 << 31 for x in integers])


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
