"""What every launcher needs: the geometry of a call, operands of the kernels, tile lookup and the launch itself.

What depends on shapes, strides and types alone is computed once and then looked up: a launch costs few microseconds.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import environment
from ...backends import philox
from ...layout import is_additive
from ..tiles import Operand, odd
from . import schedule
from .driver import on_device
from .replay import active_capture

Maybe = Tensor | None

# Products are fused with the sums that they enter, whatever Triton's default: 3.10 changes it.
FUSED = {"enable_fp_fusion": True}

# What of an argument changes with the tensors of a call: an address, and the strides or the descriptor that go with it.
Address = tuple[int, tuple[int, ...] | None, Any]


class Argument(NamedTuple):
    """An argument of a kernel.

    A launch takes addresses (and the strides of an Operand) in place of tensors, and so need not ask the driver about
    them.
    """

    tensor: Any  # or a descriptor of one
    raw: Any  # what a launch of the compiled kernel takes
    special: object  # what Triton specializes on


# What Triton compiled for each kernel, device, constants and specialization of the arguments: finding it here costs a
# tenth of finding it by Triton's own means.
_COMPILED: dict[tuple[object, ...], Any] = environment.kept({})


class Call:
    """One attention call on the triton backend: sizes and alignment of its tensors, and how to launch on them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, is_causal: bool, mask_t: Maybe = None, seed: Maybe = None,
        dropout_p: float = 0.0,
    ) -> None:  # fmt: skip
        self.is_empty = q.numel() == 0 or k.shape[-2] == 0  # nothing to launch: no query, or no key to see
        self.device, self._dtype, self.is_causal = q.device, q.dtype, is_causal
        self.precision = schedule.input_precision(self._dtype, self.device)
        geometry = _geometry(q.shape, k.shape, v.shape, self.precision)
        self.sizes, self.kv_heads, self.programs, self.batch_shape = geometry[:4]
        self.k_columns, self.v_columns, self.width, self._special = geometry[4:]
        self._is_regular = True
        self._arguments: dict[int, Argument] = {}
        self._copied: list[Tensor] = []
        self.mask: Argument | None = None
        self.mask_layout = (0, False, False, False)
        if mask is not None:
            self.mask, self.mask_layout = self._mask_operand(mask, q)
        self._scores = (*q.shape[:-1], k.shape[-2])
        self.mask_t = None if mask_t is None else self.bias_operand(mask_t)
        self.seed: Tensor | None = None
        self.dropout: tuple[int | float, ...] = ()
        if seed is not None:
            self.seed = seed.expand(q.shape[: seed.ndim]).contiguous()
            self.dropout = (philox.threshold(dropout_p), philox.factor(dropout_p), seed.ndim)

    def operands(self, *tensors: Maybe) -> tuple[Argument | None, ...]:
        """Kernel arguments. A tensor whose last dim is not contiguous is copied: the one copy of this backend."""
        known = self._arguments.get
        return tuple([None if x is None else known(id(x)) or self._operand(x) for x in tensors])

    def _operand(self, x: Tensor) -> Argument:
        given, strides = x, x.stride()
        if strides[-1] != 1 and x.shape[-1] != 1:  # mutate: if strides x
            self._copied.append(x)  # alive, so that its id stays its own
            x = x.contiguous()
            strides = x.stride()
        # mutate: packed, _, is_regular, special
        packed, _, is_regular, special = _layout(strides, x.dtype)
        address = x.data_ptr()
        aligned = address % 16 == 0
        if not (aligned and is_regular):
            self._is_regular = False
        self._arguments[id(given)] = argument = Argument(x, (address, packed), special[aligned])
        return argument

    def _mask_operand(self, mask: Tensor, q: Tensor) -> tuple[Argument, tuple[int, bool, bool, bool]]:
        """The mask, copied only where its last dim is strided, and the MASK_LAYOUT of `tiles.apply_mask`."""
        column = int(mask.shape[-1] != 1)
        if column and mask.stride(-1) != 1:
            mask = mask.contiguous()
        additive = is_additive(mask)
        mask = mask if additive else mask.view(torch.uint8)
        keys = self.sizes.keys
        packed, bits, _, special = _layout(mask.expand(*q.shape[:-1], keys).stride(), mask.dtype)
        address = mask.data_ptr()
        bits |= address // mask.element_size() | keys
        aligned = column == 1 and bits % 16 == 0 and packed[0] < 1 << 23
        argument = Argument(mask, (address, packed), special[address % 16 == 0])
        return argument, (column, aligned, additive, True)  # mutate: return argument column

    def bias_operand(self, x: Maybe) -> Argument | None:
        """A kernel argument of the mask's shape: its tangent, or a gradient. Kernels read it element by element."""
        if x is None:
            return None
        if x.shape[-1] != 1 and x.stride(-1) != 1:
            x = x.contiguous()
        packed, _, _, special = _layout(x.expand(self._scores).stride(), x.dtype)
        address = x.data_ptr()
        return Argument(x, (address, packed), special[address % 16 == 0])

    def tile(self, family: str) -> schedule.Tile:
        """What schedule.py holds for a family of portable kernels."""
        width = (
            max(self._chunks(self.k_columns)[1], self._chunks(self.v_columns)[1]) if self._is_odd_half else self.width
        )
        return schedule.lookup(self.device, self.precision, family, width)

    @property
    def _is_odd_half(self) -> bool:
        """Of a half type, with rows that start elsewhere than at multiples of 16 bytes."""
        return self.precision == "half" and not self._is_regular

    def _chunks(self, columns: tuple[int, ...]) -> tuple[int, ...]:
        """A head dim and its chunks: one of 64 or more where rows start anywhere. With Triton 3.6 products of chunks
        of 16 or 32 columns are wrong there (docs/hopper.md)."""
        return (columns[0], max(64, 1 << (columns[0] - 1).bit_length())) if self._is_odd_half else columns

    def query_programs(self, rows: int) -> int:
        """Programs of a kernel that owns tiles of so many query rows."""
        return self.programs * self.sizes.heads * -(-self.sizes.queries // rows)

    def key_programs(self, rows: int) -> int:
        """Programs of a kernel that owns tiles of so many key rows."""
        return self.programs * self.kv_heads * -(-self.sizes.keys // rows)

    def launch(
        self, kernel: Any, family: str, programs: int, args: Sequence[Any], scale: float, *, warps: int = 4,
        stages: int | None = None, launch_pdl: bool = False, **constants: object,
    ) -> None:  # fmt: skip
        """Runs `kernel(*args, scale, [batch_shape,] *sizes, *constants)` in so many programs.

        `args` come from `operands`, or are contiguous tensors, descriptors of tensors of q's dtype, and None. Of the
        constants given here and those of every call, the kernel takes those that it names, last. `family` is a name
        for who watches launches. With `launch_pdl` programs may start as soon as all of the kernel before this one
        have, if that one allows it.
        """
        arguments = [None if x is None else _argument(x) for x in args]
        taken = self._taken(kernel, constants)
        key = (
            kernel.fn, self.device, self._dtype, self._special, warps, stages, launch_pdl, *taken.values(),
            *[None if x is None else x.special for x in arguments],
        )  # fmt: skip
        compiled = _COMPILED.get(key)
        sizes = (scale, self.batch_shape, *self.sizes) if "batch_shape" in kernel.arg_names else (scale, *self.sizes)
        with on_device(self.device):
            if compiled is not None:
                raw = [None if x is None else x.raw for x in arguments]
                compiled[(programs, 1, 1)](*raw, *sizes, *taken.values())
            else:
                given = [None if x is None else _as_compiled_for(x) for x in arguments]
                options = {"num_stages": stages} if stages is not None else {}
                options |= {"launch_pdl": True} if launch_pdl else {}
                compiled = kernel[(programs,)](*given, *sizes, **taken, num_warps=warps, **options, **FUSED)
                if compiled is not None:  # the interpreter compiles nothing
                    _COMPILED[key] = compiled
        if (seen := active_capture()) is not None:
            addresses = [None if x is None else _address_of(x) for x in arguments]
            seen.launch(compiled, programs, (*sizes, *taken.values()), addresses)

    def _taken(self, kernel: Any, given: dict[str, object]) -> dict[str, object]:
        """The constants that a kernel takes, in its order: those `given` and those of every call."""
        every = {
            "K_COLUMNS": self._chunks(self.k_columns), "V_COLUMNS": self._chunks(self.v_columns),
            "CAUSAL": self.is_causal,
            "MASK_LAYOUT": self.mask_layout, "DROPOUT": self.dropout,
            "PRECISION": "tf32" if self.precision == "tf32" else "ieee", "REGULAR": self._is_regular, **given,
        }  # fmt: skip
        names = kernel.arg_names
        taken = {name: every[name] for name in names[names.index("group") + 1 :]}
        if not given.keys() <= taken.keys():
            raise TypeError(f"the kernel takes no {', '.join(given.keys() - taken.keys())}")
        return taken


class Sizes(NamedTuple):
    """What every kernel takes of the sizes of a call."""

    queries: int
    keys: int
    heads: int  # of queries
    group: int  # query heads of a key head


class _Geometry(NamedTuple):
    """What the sizes of q, k and v say about a call."""

    sizes: Sizes
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
def _geometry(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], precision: str) -> _Geometry:
    *batch, heads, m, d = q
    kv_heads, n, dv = k[-3], k[-2], v[-1]
    batch_shape = tuple(odd(size) for size in reversed(batch)) or (odd(1),)
    programs = 1
    for size in batch:
        programs *= size
    sizes = Sizes(m, n, heads, heads // max(kv_heads, 1))
    k_columns = (d, *schedule.chunk_widths(d, precision))
    v_columns = (dv, *schedule.chunk_widths(dv, precision))
    width = max(sum(schedule.chunk_widths(columns, "half")) for columns in (d, dv))
    special = _special(precision, k_columns, v_columns, sizes.group, *_widths((*batch_shape, *sizes)))
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


def _argument(x: Any) -> Argument:
    """What a launch takes of an argument."""
    if isinstance(x, Argument):
        return x
    if isinstance(x, Tensor):
        return _statistic(x)
    return Argument(x, x, tuple(x.block_shape))  # a descriptor, whose layout follows from the type and the tile


def _statistic(x: Tensor) -> Argument:
    """A row statistic, which kernels read as contiguous: one that vmap expanded is copied."""
    x = x.contiguous()  # mutate: x
    address = x.data_ptr()
    return Argument(x, address, _special(address % 16 == 0, x.dtype))


def _address_of(argument: Argument) -> Address:
    """The address that a launch takes, and the strides of an Operand or the descriptor beside it."""
    raw = argument.raw
    if isinstance(raw, int):
        return raw, None, None
    if isinstance(raw, tuple):
        address, strides = raw
        return address, strides, None
    return raw.base.data_ptr(), None, raw


@cache
def _special(*what: object) -> object:
    """Stands for `what` in the keys of _COMPILED, cheap to hash. There are few, unlike sizes and strides."""
    return object()


def _widths(integers: tuple[int, ...]) -> tuple[bool, ...]:
    """Which integers need 64 bits, and so their number."""
    return tuple([x >= 1 << 31 for x in integers])


def _as_compiled_for(argument: Argument) -> Any:
    """An argument as Triton compiles for it."""
    if isinstance(argument.raw, tuple):
        _, strides = argument.raw
        return Operand(argument.tensor, strides)
    return argument.tensor
