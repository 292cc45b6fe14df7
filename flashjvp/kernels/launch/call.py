"""What every launcher needs: the operands of the kernels, the tile of a kernel family, and the launch itself.

What follows from shapes, strides and types alone (geometry.py) is looked up, so that a launch costs few microseconds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import environment
from ...backends import philox
from ...backends.patterns import Band, Listed, Packed
from ...layout import is_additive
from . import compilation, schedule
from .argument import ABSENT, Argument, address_of, argument, examples, interpreted, seed_operand
from .driver import index_of, on_device
from .geometry import geometry, in_one_chunk, layout
from .replay import active_capture

Maybe = Tensor | None

# Products are fused with the sums that they enter, whatever Triton's default: 3.10 changes it.
FUSED = {"enable_fp_fusion": True}
OPEN = 1 << 30  # for a side of a band that is not bounded

# What Triton compiled for each kernel, device, constants and classes of the arguments: finding it here costs a
# tenth of finding it by Triton's own means.
_COMPILED: dict[tuple[object, ...], Any] = environment.kept({})
# What `_parameters` found, by the function that a kernel is made of.
_PARAMETERS: dict[object, tuple[tuple[str, ...], bool, bool]] = environment.kept({})


class Call:
    """One attention call on the triton backend: sizes and alignment of its tensors, and how to launch on them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, is_causal: bool, mask_t: Maybe = None, seed: Maybe = None,
        dropout_p: float = 0.0, pattern: Band | Listed | Packed | None = None, high: bool = False,
    ) -> None:  # fmt: skip
        self.device, self._dtype, self.is_causal = q.device, q.dtype, is_causal
        self._index, self._shape = index_of(self.device), q.shape
        self.precision = schedule.input_precision(self._dtype, self.device)
        if high:
            self.precision = schedule.high_precision(self.device)
        if self.precision == "ieee":
            self.precision = schedule.float32_products(self.device, max(q.shape[-1], v.shape[-1]))
        (
            self.sizes, self.kv_heads, self.programs, self.batch_shape, self.k_columns, self.v_columns, self.width,
            self.is_empty, self._special,
        ) = geometry(self._shape, k.shape, v.shape, self.precision)  # fmt: skip
        self._is_regular = True
        self._arguments: dict[int, Argument] = {}
        self._copied: list[Tensor] = []
        self.mask: Argument | None = None
        self.mask_layout = (0, False, False, False)
        self.pattern = pattern
        self.plan: tuple[Maybe, ...] = ()
        self.band: tuple[int, ...] = ()
        self.sequences: int | None = None  # that are packed
        if isinstance(pattern, Listed):
            self.plan, self.band, mask = (mask,), (0, 0), None
        elif isinstance(pattern, Packed):
            assert mask is not None
            self.plan, self.sequences, mask = (mask,), mask.shape[-1] - 1, None
            self.band = (-OPEN, self.sizes.keys - self.sizes.queries if is_causal else OPEN)  # mutate: self.band
        elif pattern is not None:
            self.plan, self.band = (None,), pattern
        if pattern is not None:
            self.mask_layout = (0, False, False, True)
        if mask is not None:
            self.mask, self.mask_layout = self._mask_operand(mask)
        self.mask_t = None if mask_t is None else self.bias_operand(mask_t)
        self.seed: Argument | None = None
        self.dropout: tuple[int, ...] = ()
        if seed is not None:
            seeds = seed.expand(self._shape[: seed.ndim]).contiguous()
            self.seed = seed_operand(seeds, philox.threshold(dropout_p), philox.factor(dropout_p))
            self.dropout = (seed.ndim,)

    def operands(self, *tensors: Maybe) -> tuple[Argument | None, ...]:
        """Kernel arguments. A tensor whose last dim is not contiguous is copied."""
        known = self._arguments.get
        return tuple([None if x is None else known(id(x)) or self._operand(x) for x in tensors])

    def _operand(self, x: Tensor) -> Argument:
        given, strides = x, x.stride()
        if strides[-1] != 1 and x.shape[-1] != 1:  # mutate: if strides x
            self._copied.append(x)  # alive, so that its id stays its own
            x = x.contiguous()
            strides = x.stride()
        # mutate: packed, _, is_regular, special
        packed, _, is_regular, special = layout(strides, x.dtype)
        address = x.data_ptr()
        if not (is_regular and address % 16 == 0):
            self._is_regular = False
        self._arguments[id(given)] = found = x, (address, packed), special
        return found

    def _mask_operand(self, mask: Tensor) -> tuple[Argument, tuple[int, bool, bool, bool]]:
        """The mask, copied only where its last dim is strided, and the MASK_LAYOUT of `tiles.apply_mask`."""
        column = int(mask.shape[-1] != 1)
        if column and mask.stride(-1) != 1:
            mask = mask.contiguous()
        additive = is_additive(mask)
        mask = mask if additive else mask.view(torch.uint8)
        keys = self.sizes.keys
        packed, bits, _, special = layout(mask.expand(*self._shape[:-1], keys).stride(), mask.dtype)
        address = mask.data_ptr()
        bits |= address // mask.element_size() | keys
        aligned = column == 1 and bits % 16 == 0 and packed[0] < 1 << 23
        found = mask, (address, packed), special
        return found, (column, aligned, additive, True)  # mutate: return found column

    @property
    def mask_tensor(self) -> Maybe:
        """The mask, a boolean one as bytes."""
        tensor, _, _ = self.mask or ABSENT
        return tensor

    def bias_operand(self, x: Maybe) -> Argument | None:
        """A kernel argument of the mask's shape: its tangent, or a gradient. Kernels read it element by element."""
        if x is None:
            return None
        if x.shape[-1] != 1 and x.stride(-1) != 1:
            x = x.contiguous()
        packed, _, _, special = layout(x.expand(*self._shape[:-1], self.sizes.keys).stride(), x.dtype)
        return x, (x.data_ptr(), packed), special

    def tile(self, family: str) -> schedule.Tile:
        """What schedule.py holds for a family of portable kernels."""
        width = self.width
        if self._is_odd_half:
            width = max(sum(in_one_chunk(columns)[1:]) for columns in (self.k_columns, self.v_columns))
        return schedule.lookup(self.device, self.precision, family, width, self.has_options)

    def family(self, name: str) -> str:
        """What a launch of a family of portable kernels is called."""
        if self.pattern is None:
            return name
        return f"partial_{name}" if self.sequences is None else f"varlen_{name}"

    @property
    def has_options(self) -> bool:
        """Whether the call has dropout or a tangent of its mask."""
        return self.mask_t is not None or self.seed is not None

    @property
    def _is_odd_half(self) -> bool:
        """Of a half type, with rows that start elsewhere than at multiples of 16 bytes."""
        return self._dtype.itemsize == 2 and not self._is_regular

    def query_programs(self, rows: int) -> int:
        """Programs of a kernel that owns tiles of so many query rows."""
        return self.programs * self.sizes.heads * self.tiles(self.sizes.queries, rows)

    def key_programs(self, rows: int) -> int:
        """Programs of a kernel that owns tiles of so many key rows."""
        return self.programs * self.kv_heads * self.tiles(self.sizes.keys, rows)

    def tiles(self, length: int, rows: int) -> int:
        """Tiles of so many rows. Of packed sequences, each of which has its own, at least as many as there are."""
        return -(-length // rows) if self.sequences is None else length // rows + self.sequences

    def launch(
        self, kernel: Any, family: str, programs: int, args: Sequence[Any], scale: float, *, warps: int = 4,
        stages: int | None = None, launch_pdl: bool = False, **constants: object,
    ) -> None:  # fmt: skip
        """Runs `kernel(*args, scale, [batch_shape,] [low, high,] *sizes, *constants)` in so many programs.

        `args` come from `operands`, or are contiguous tensors, descriptors of tensors of q's dtype, and None. Of the
        constants given here and those of every call, the kernel takes those that it names, last. `family` is a name
        for who watches launches. With `launch_pdl` programs may start as soon as all of the kernel before this one
        have, if that one allows it.
        """
        arguments = [ABSENT if x is None else x if type(x) is tuple else argument(x) for x in args]
        tensors, raw, classes = zip(*arguments, strict=True)
        names, has_batch_shape, takes_band = _PARAMETERS.get(kernel.fn) or _parameters(kernel)
        taken = [*map(self.constants(constants).__getitem__, names)]
        key = (
            kernel.fn, self.device, self._dtype, self._special, warps, stages, launch_pdl, *taken, *classes
        )  # fmt: skip
        compiled, seen = _COMPILED.get(key), active_capture()
        band = self.band if takes_band else ()
        rest = (scale, *((self.batch_shape,) if has_batch_shape else ()), *band, *self.sizes)
        if compiled is None:
            if not constants.keys() <= {*names}:
                raise TypeError(f"the kernel takes no {', '.join(constants.keys() - {*names})}")
            options: dict[str, Any] = dict(zip(names, taken, strict=True), num_warps=warps, **FUSED)
            options |= {"num_stages": stages} if stages is not None else {}
            options |= {"launch_pdl": True} if launch_pdl else {}
            if compilation.is_compiled(kernel):
                # A band takes as many bits as the sizes that bound it. Of the group, the last of the sizes, only
                # whether it is 1 makes a difference.
                bounds = (max(self.sizes.queries, self.sizes.keys),) * len(band)
                numbers = (*rest[: -len(self.sizes) - len(band)], *bounds, *self.sizes[:-1])
                given = [*examples(tensors, classes), *numbers, 1 if self.sizes.group == 1 else 3]
                wanted = compilation.Wanted(self._index, kernel, given, options, _COMPILED, key)
                again = seen is None and self.device.type != "meta"  # where nothing is launched
                compiled = compilation.compiled(wanted, may_break_off=again)
            else:
                with on_device(self._index):
                    found = kernel[(programs,)](*map(interpreted, tensors, raw), *rest, **options)
                if found is not None:  # the interpreter compiles nothing
                    _COMPILED[key] = found
        if compiled is not None and compilation.THREAD.collected is None:
            with on_device(self._index):
                compiled[(programs, 1, 1)](*raw, *rest, *taken)
        if seen is not None:
            seen.launch(_COMPILED.get(key), programs, (*rest, *taken), [*map(address_of, raw)])

    def constants(self, given: dict[str, object]) -> dict[str, object]:
        """The constants of every call, and those `given`."""
        k_columns, v_columns = self.k_columns, self.v_columns
        if self._is_odd_half:
            k_columns, v_columns = in_one_chunk(k_columns), in_one_chunk(v_columns)
        return {
            "K_COLUMNS": k_columns, "V_COLUMNS": v_columns, "CAUSAL": self.is_causal, "MASK_LAYOUT": self.mask_layout,
            "DROPOUT": self.dropout, "PRECISION": "ieee" if self.precision == "half" else self.precision,
            "REGULAR": self._is_regular, **given,
        }  # fmt: skip


def _parameters(kernel: Any) -> tuple[tuple[str, ...], bool, bool]:
    """The names of the constants that a kernel takes, after its sizes, and whether it takes batch dims and a band."""
    names = kernel.arg_names
    found = tuple(names[names.index("group") + 1 :]), "batch_shape" in names, "low" in names
    _PARAMETERS[kernel.fn] = found
    return found
