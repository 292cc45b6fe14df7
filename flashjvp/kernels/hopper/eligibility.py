"""Which calls the warp-specialised kernels serve, on copies or not, and of others, in words, why not."""

from torch import Tensor

from ... import environment
from ...backends.patterns import Band, Listed, Packed
from ...operands import Inputs
from ..launch import hopper_tables, schedule
from ..launch.call import Call, Maybe
from ..launch.hopper_tables import MEASURED_MASKS

NAMES = (*Inputs._fields, "the gradient of o", "the gradient of o_t")
PATTERNS: dict[type, str] = {Band: "a window", Listed: "a block mask", Packed: "packed sequences"}
DENSE_WIDTH = 128  # the largest padded head dim of the kernels for all calls; above it are the wide ones
BLOCK = 128  # queries and keys of a mask that a program packs
LEAST_WIDTH = 64  # the least padded head dim that has such kernels


class Misfit(Exception):
    """Raised before anything is launched, of a call that kernels serve on copies (backends/copies.py). `addressed`:
    by TMA, which does not read from any address with any strides."""

    def __init__(self, addressed: bool) -> None:
        super().__init__("a call whose tensors are to be copied reached kernels that read them")
        self.addressed = addressed


def obstacle(call: Call, inputs: Inputs, scale: float) -> str | None:
    """Why the kernels do not serve this call, whose head dims are padded to one that schedule.py names; None if so.

    One batch dim at most, no tangent of a mask, windows, block masks and packed sequences of half types alone, a
    positive scale. Above DENSE_WIDTH half types with tangents, and no windows, block masks or packed sequences. What
    else they need, copies have: `misfit`.
    """
    return unwritten(call, inputs, scale) or unmeasured(call)


def unwritten(call: Call, inputs: Inputs, scale: float) -> str | None:
    """What of a call the kernels are not written for, however its tensors lie in memory.

    A tangent of v alone makes no tangent of the scores. The kernels would multiply zeros for it: 0.91 ms at
    1,24,4096,128 in bfloat16, where the portable ones, compiled without those products, take 0.71 ms.
    """
    value_width, *_ = call.v_columns
    of_mask = None if call.mask is None else _unserved_mask(call)
    if call.seed is not None:
        return "dropout"
    if call.width > DENSE_WIDTH and (reason := _unwritten_wide(call, inputs)) is not None:
        return reason
    if call.pattern is not None and call.precision == "tf32":
        # the scales would be those of rows that nobody sees, too
        return f"{PATTERNS[type(call.pattern)]} of float32 tensors"
    if isinstance(call.pattern, Band) and call.mask is not None:
        return "a mask beside a window"
    if isinstance(call.pattern, Packed) and call.programs != 1:
        return f"packed sequences with a batch dim of {call.programs}"
    if call.precision == "half" and inputs.v_t is not None and inputs.q_t is None and inputs.k_t is None:
        return "a tangent of v alone, for which the portable kernels are faster"
    if value_width > 0 and of_mask is None and len(call.batch_shape) == 1 and scale > 0:
        return None
    if value_width == 0:
        return "v without columns"
    if of_mask is not None:
        return of_mask
    if len(call.batch_shape) != 1:
        return f"{len(call.batch_shape)} batch dims: flatten them to one"
    return f"a scale that is not positive, {scale}"


def _unwritten_wide(call: Call, inputs: Inputs) -> str | None:
    """What of a call at head dims above 128 the kernels are not written for."""
    found = {
        "float32": call.precision != "half",
        "no tangents or no cotangent of o_t": all(x is None for x in (inputs.q_t, inputs.k_t, inputs.v_t)),
        **{what: isinstance(call.pattern, kind) for kind, what in PATTERNS.items()},
    }
    return next((f"{what} at head dims above {DENSE_WIDTH}" for what, is_given in found.items() if is_given), None)


def in_one_pass(call: Call) -> bool:
    """Whether backward_one_pass.py serves the backward pass of a call that the kernels serve.

    Causal calls are 6 % faster in two passes: one would hide scores in every tile, not in those at the diagonal alone.
    In a band the tiles at its ends have a loop of their own.
    """
    if call.pattern is not None:
        return call.precision == "half" and isinstance(call.pattern, Band | Packed)
    is_measured = environment.triton_release() in hopper_tables.MEASURED_ONE_PASS.get(call.width, ())
    return is_measured and call.precision == "half" and call.mask is None and not call.is_causal


def in_pairs(call: Call) -> bool:
    """Whether the kernel of d_k, d_v, d_k_t and d_v_t of a call with tangents takes queries in pairs (pairs.py)."""
    return environment.triton_release() in hopper_tables.MEASURED_PAIRS.get(call.width, ())


def narrow_values(call: Call) -> int | None:
    """The columns to which the forward pass of a call of half types pads v and o; None: as many as q and k have."""
    narrow = hopper_tables.NARROW_VALUES.get(call.width)
    is_measured = environment.triton_release() in hopper_tables.MEASURED_NARROW_VALUES
    # mutate: return narrow
    return narrow if is_measured and narrow is not None and call.v_columns[0] <= narrow else None


def may_accumulate_dq(call: Call, in_one_pass: bool) -> bool:
    """Whether query gradients may be added up in any order. Of packed sequences they may not, whose bits are those of
    each alone; in one pass within a band they are not."""
    never_here = in_one_pass and call.pattern is not None and call.width not in hopper_tables.ONE_PASS_UNLESS_SUMMED
    return call.sequences is None and not never_here


def unmeasured(call: Call) -> str | None:
    """That this release of Triton was not measured with such masks, windows or packed sequences; None if it was,
    or nothing runs here."""
    is_wide = call.width > DENSE_WIDTH
    if call.pattern is None and (call.mask is None or (is_boolean(call.mask_tensor) and not is_wide)):
        return None
    measured = hopper_tables.MEASURED_BANDS if isinstance(call.pattern, Band | Packed) else MEASURED_MASKS
    measured = hopper_tables.MEASURED_WIDE_MASKS if call.pattern is None and is_wide else measured
    if call.device.type != "cuda" or environment.triton_release() in measured:
        return None
    of_mask = f"a mask at head dims above {DENSE_WIDTH}" if is_wide else "an additive mask"
    what = of_mask if call.pattern is None else PATTERNS[type(call.pattern)]
    return f"{what} with another Triton than {', '.join('.'.join(map(str, x)) for x in measured)}"


def misfit(call: Call, inputs: Inputs, cotangents: tuple[Maybe, ...]) -> str | None:
    """Why the kernels serve a call on copies, and how to avoid that; None if they do not need any.

    They take head dims that 8 divides, so that the rows of results start at multiples of 16 bytes, and tensors that TMA
    can address. What is scaled is copied anyway.
    """
    (width, *_), (value_width, *_) = call.k_columns, call.v_columns
    if width % 8 != 0 or value_width % 8 != 0:
        return _padded(width, value_width)
    tensors = (*inputs, *cotangents)
    if call.precision == "tf32" or all(x is None or fits(x) for x in tensors):
        return None
    name, x = next((name, x) for name, x in zip(NAMES, tensors, strict=False) if x is not None and not fits(x))
    *outer, column = x.stride()
    if 0 in x.stride():
        return f"{name} is broadcast, its strides are {[*x.stride()]}: {_mended(name, 'contiguous')}"
    if column != 1:
        return f"the last dim of {name} is not contiguous, its stride is {column}: {_mended(name, 'contiguous')}"
    if x.data_ptr() % 16 != 0:
        return f"{name} starts at an address that 16 bytes do not divide: {_mended(name, 'clone')}"
    apart = [stride * x.element_size() for stride in outer]
    return f"rows of {name} are {apart} bytes apart, which 16 does not divide: {_mended(name, 'contiguous')}"


def misfit_of_narrow(call: Call) -> str | None:
    """Likewise of head dims for which there are portable kernels alone: where 8 does not divide them, these read half
    types element by element, which takes five to seven times as long."""
    (width, *_), (value_width, *_) = call.k_columns, call.v_columns
    is_odd = width % 8 != 0 or value_width % 8 != 0
    if not is_odd or call.precision != "half" or call.width >= LEAST_WIDTH:
        return None
    return _padded(width, value_width) if schedule.has_pipelines(call.device, "half", LEAST_WIDTH) else None


def _padded(width: int, value_width: int) -> str:
    name = f"D={width}" if width % 8 != 0 else f"Dv={value_width}"
    return (
        f"{name} is not a multiple of 8: each call copies tensors into ones padded with zeros, and results back, "
        "which takes time and memory. Padding q, k, v with zeros beforehand (and giving scale=D**-0.5) avoids that"
    )


def fits(x: Tensor) -> bool:
    """Whether TMA can address a tensor's rows: aligned to 16 bytes, unit column stride, no broadcast dims."""
    *outer, column = x.stride()
    return column == 1 and x.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in outer
    )  # fmt: skip


def _unserved_mask(call: Call) -> str | None:
    """What of a call's mask the kernels are not written for.

    32 bits count the words of a head of a boolean mask (packed_mask.py), and the numbers of one of an additive mask
    (bias.py).
    """
    m, n = call.sizes.queries, call.sizes.keys
    if is_boolean(call.mask_tensor):
        return None if (m + BLOCK) * (n + BLOCK) < 1 << 36 else "a mask of too many queries and keys"
    if call.mask_t is not None:
        return "a tangent of the mask"
    if call.precision != "half":
        return "an additive mask in TF32"
    assert call.mask is not None
    column, *_ = call.mask_layout
    _, (_, (row, *_)), _ = call.mask
    if column == 0:
        return "an additive mask of one key for all"
    return None if m * max(row, 1) + n < 1 << 31 else "a mask of too many queries and keys"


def is_boolean(mask: Maybe) -> bool:
    """A boolean mask comes as bytes."""
    return mask is not None and mask.element_size() == 1


def _mended(name: str, how: str) -> str:
    """A user holds the inputs, and of the gradients the loss that they come from."""
    mended = f"{name}.{how}()" if name in Inputs._fields else "a loss that is no plain sum of outputs"
    return f"each call copies it, which takes time and memory. {mended} avoids that"
