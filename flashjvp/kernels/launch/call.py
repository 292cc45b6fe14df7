"""What every launcher needs: the geometry of a call, operands of the kernels, tile lookup and the launch itself.

What depends on shapes, strides and types alone is computed once and then looked up: a launch costs few microseconds.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import is_additive
from ..tiles import Operand, odd
from . import schedule
from .driver import on_device
from .replay import recorder

Maybe = Tensor | None

# Products are fused with the sums that they enter, whatever Triton's default: 3.10 changes it.
FUSED = {"enable_fp_fusion": True}

# An argument of a kernel: the tensor, what a launch takes of it, and what Triton specializes on. A launch takes its
# address (and strides, if it is an Operand), and so need not ask the driver about it.
Argument = tuple[Tensor, Any, object]
# What of an argument changes with the tensors of a call: an address, and the strides or the descriptor that go with it.
Address = tuple[int, tuple[int, ...] | None, Any]

# What Triton compiled for each kernel, device, constants and specialization of the arguments: finding it here costs a
# tenth of finding it by Triton's own means.
_COMPILED: dict[tuple[object, ...], Any] = {}


class Call:
    """One attention call on the triton backend: sizes and alignment of its tensors, and how to launch on them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, is_causal: bool) -> None:
        self.is_empty = q.numel() == 0
        self.device, self._dtype, self.is_causal = q.device, q.dtype, is_causal
        self.kind = schedule.kind_of_product(self._dtype, self.device)
        geometry = _geometry(q.shape, k.shape, v.shape, self.kind)
        self.sizes, self.kv_heads, self.programs, self.batch_shape = geometry[:4]
        self.k_columns, self.v_columns, self.width, self._special = geometry[4:]
        self._is_regular = True
        self._arguments: dict[int, Argument] = {}
        self._copied: list[Tensor] = []
        self.mask: Argument | None = None
        self.mask_layout = (0, False, False)
        if mask is not None:
            self.mask, self.mask_layout = self._mask_operand(mask, q)

    def operands(self, *tensors: Maybe) -> tuple[Argument | None, ...]:
        """Kernel arguments. A tensor whose last dim is not contiguous is copied: the one copy of this backend."""
        known = self._arguments.get
        return tuple([None if x is None else known(id(x)) or self._operand(x) for x in tensors])

    def _operand(self, x: Tensor) -> Argument:
        given, strides = x, x.stride()
        if strides[-1] != 1 and x.shape[-1] != 1:
            self._copied.append(x)  # alive, so that its id stays its own
            x = x.contiguous()
            strides = x.stride()
        packed, _, is_regular, special = _layout(strides, x.dtype)
        address = x.data_ptr()
        aligned = address % 16 == 0
        if not (aligned and is_regular):
            self._is_regular = False
        self._arguments[id(given)] = argument = x, (address, packed), special[aligned]
        return argument

    def _mask_operand(self, mask: Tensor, q: Tensor) -> tuple[Argument, tuple[int, bool, bool]]:
        """The mask, copied only where its last dim is strided, and the MASK_LAYOUT of `tiles.apply_mask`."""
        column = int(mask.shape[-1] != 1)
        if column and mask.stride(-1) != 1:
            mask = mask.contiguous()
        additive = is_additive(mask)
        mask = mask if additive else mask.view(torch.uint8)
        keys = self.sizes[1]
        packed, bits, _, special = _layout(mask.expand(*q.shape[:-1], keys).stride(), mask.dtype)
        address = mask.data_ptr()
        bits |= address // mask.element_size() | keys
        aligned = column == 1 and bits % 16 == 0 and packed[0] < 1 << 23
        return (mask, (address, packed), special[address % 16 == 0]), (column, aligned, additive)

    def query_programs(self, tile: schedule.Tile) -> int:
        """Programs of a kernel that owns tiles of query rows."""
        return self.programs * self.sizes[2] * -(-self.sizes[0] // tile.block_m)

    def key_programs(self, tile: schedule.Tile) -> int:
        """Programs of a kernel that owns tiles of key rows."""
        return self.programs * self.kv_heads * -(-self.sizes[1] // tile.block_n)

    def launch(
        self, kernel: Any, family: str, programs: Callable[[schedule.Tile], int], args: Sequence[Any], scale: float,
        tile: schedule.Tile | None = None,
    ) -> None:  # fmt: skip
        """Runs `kernel(*args, scale, batch_shape, *sizes, ...)` with the tile that schedule.py holds for `family`, or
        the one given."""
        tile = tile or schedule.lookup(self.device, self.kind, family, self.width)
        constants = (
            self.k_columns,
            self.v_columns,
            (tile.block_m, tile.block_n),
            self.is_causal,
            self.mask_layout,
            "tf32" if self.kind == "tf32" else "ieee",
            self._is_regular,
        )
        arguments = [_statistic(x) if isinstance(x, Tensor) else x for x in args]
        special = [None if x is None else x[2] for x in arguments]
        key = (
            kernel.fn, self.device, tile, self._special, self.is_causal, self.mask_layout, self._is_regular, *special
        )  # fmt: skip
        compiled = _COMPILED.get(key)
        rest = (scale, self.batch_shape, *self.sizes, *constants)
        with on_device(self.device):
            if compiled is not None:
                raw = [None if x is None else x[1] for x in arguments]
                compiled[(programs(tile), 1, 1)](*raw, *rest)
            else:
                operands = [None if x is None else _operand_of(x) for x in arguments]
                compiled = kernel[(programs(tile),)](
                    *operands, *rest, num_warps=tile.warps, num_stages=tile.stages, **FUSED
                )  # fmt: skip
                if compiled is not None:  # the interpreter compiles nothing
                    _COMPILED[key] = compiled
        if (seen := recorder()) is not None:
            seen.launch(compiled, programs(tile), rest, [None if x is None else _address_of(x) for x in arguments])

    def launch_pipeline(
        self, kernel: Any, family: str, programs: int, args: Sequence[Any], scale: float, launch_pdl: bool = False,
        **constants: object,
    ) -> None:  # fmt: skip
        """Runs a warp-specialised `kernel(*args, scale, *sizes, ...)` of `family`, one warpgroup and its partitions.

        `args` are descriptors of tensors of q's dtype, tensors and None; `kernel` has its constants last. With
        `launch_pdl` its programs may start as soon as all of the kernel before it have, if that one allows it.
        """
        constants["CAUSAL"] = self.is_causal
        key = (family, self.device, self._dtype, self._special, *constants.items(), *map(_special_of_pipeline, args))
        compiled = _COMPILED.get(key)
        rest = (scale, *self.sizes)
        with on_device(self.device):
            if compiled is not None:
                compiled[(programs, 1, 1)](*args, *rest, *_ordered(kernel, constants))
            else:
                compiled = kernel[(programs,)](*args, *rest, **constants, num_warps=4, launch_pdl=launch_pdl, **FUSED)
                if compiled is not None:
                    _COMPILED[key] = compiled
        if (seen := recorder()) is not None:
            values = () if compiled is None else (*rest, *_ordered(kernel, constants))
            seen.launch(compiled, programs, values, [None if x is None else _address_in_pipeline(x) for x in args])


class _Geometry(NamedTuple):
    """What the sizes of q, k and v say about a call."""

    sizes: tuple[int, int, int, int]  # query rows, key rows, query heads, query heads of a key head
    kv_heads: int
    programs: int  # the product of the batch dims
    batch_shape: tuple[int, ...]  # of odd sizes, from last to first
    k_columns: tuple[int, ...]
    v_columns: tuple[int, ...]
    width: int  # the larger head dim, padded as tensor cores of the half types have it
    special: object  # what Triton compiles for


class _Layout(NamedTuple):
    """What the strides and the type of a tensor say about an Operand."""

    strides: tuple[int, ...]  # of the Operand
    bits: int  # that any stride but the column's has
    is_regular: bool  # rows start at multiples of 16 bytes, and 32 bits hold the offsets in a tile
    special: tuple[object, object]  # what Triton specializes on, without and with an address that 16 divides


@lru_cache(1 << 14)
def _geometry(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], kind: str) -> _Geometry:
    *batch, heads, m, d = q
    kv_heads, n, dv = k[-3], k[-2], v[-1]
    batch_shape = tuple(odd(size) for size in reversed(batch)) or (odd(1),)
    programs = 1
    for size in batch:
        programs *= size
    sizes = (m, n, heads, heads // max(kv_heads, 1))
    k_columns = (d, *schedule.chunk_widths(d, kind))
    v_columns = (dv, *schedule.chunk_widths(dv, kind))
    width = max(sum(schedule.chunk_widths(columns, "half")) for columns in (d, dv))
    special = _special(kind, k_columns, v_columns, sizes[3], *_widths((*batch_shape, *sizes)))
    return _Geometry(sizes, kv_heads, programs, batch_shape, k_columns, v_columns, width, special)


@lru_cache(1 << 14)
def _layout(strides: tuple[int, ...], dtype: torch.dtype) -> _Layout:
    """Of [*batch, head, row, column] strides (without batch dims, one of 0).

    Triton specializes on a row stride of 1 or a multiple of 16, and on which integers are long.
    """
    *batch, head, row, _ = strides
    packed = (row, odd(head), *(map(odd, reversed(batch)) if batch else (odd(0),)))
    bits = 0
    for stride in strides[:-1]:
        bits |= stride
    is_regular = bits * dtype.itemsize % 16 == 0 and row < 1 << 23
    special = (dtype, row == 1, row % 16 == 0, *_widths(packed))
    return _Layout(packed, bits, is_regular, (_special(False, *special), _special(True, *special)))


def _ordered(kernel: Any, constants: dict[str, object]) -> list[object]:
    """Constants in the order in which a kernel takes them, last."""
    return [constants[name] for name in kernel.arg_names[-len(constants) :]]


def _address_of(argument: Argument) -> Address:
    """The address that a launch takes, and the strides beside it if it is an Operand."""
    raw = argument[1]
    return (raw[0], raw[1], None) if isinstance(raw, tuple) else (raw, None, None)


def _address_in_pipeline(x: Any) -> Address:
    """The address of a tensor, or of a descriptor with that."""
    return (x.data_ptr(), None, None) if isinstance(x, Tensor) else (x.base.data_ptr(), None, x)


def _statistic(x: Tensor) -> Argument:
    """A row statistic, which kernels read as contiguous: one that vmap expanded is copied."""
    x = x.contiguous()
    address = x.data_ptr()
    return x, address, _special(address % 16 == 0, x.dtype)


def _special_of_pipeline(x: Any) -> object:
    """What Triton specializes on of a tensor, or of a descriptor, whose layout follows from the type and the tile."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x if x is None else tuple(x.block_shape)


@cache
def _special(*what: object) -> object:
    """Stands for `what` in the keys of _COMPILED, cheap to hash. There are few, unlike sizes and strides."""
    return object()


def _widths(integers: tuple[int, ...]) -> tuple[bool, ...]:
    """Which integers need 64 bits, and so their number."""
    return tuple([x >= 1 << 31 for x in integers])


def _operand_of(argument: Argument) -> Operand | Tensor:
    """An argument as Triton compiles for it."""
    tensor, raw, _ = argument
    return Operand(tensor, raw[1]) if isinstance(raw, tuple) else tensor
