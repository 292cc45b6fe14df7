"""Which calls the warp-specialised kernels serve, and of others, in words, why not."""

from torch import Tensor

from ... import environment
from ...backends.patterns import Listed
from ...operands import Inputs
from ..launch.call import Call, Maybe
from ..launch.hopper_tables import MEASURED

NAMES = (*Inputs._fields, "the gradient of o", "the gradient of o_t")
BLOCK = 128  # queries and keys of a mask that a program packs


def obstacle(call: Call, inputs: Inputs, cotangents: tuple[Maybe, ...], scale: float) -> str | None:
    """Why the kernels do not serve this call, whose head dims are padded to one that schedule.py names; None if so.

    One batch dim at most, head dims that 8 divides, no mask but a boolean one or, of half types, a block mask, a
    positive scale, tensors that TMA can address: the inputs, unless they are scaled (per_tensor_scaling.py), and the
    results, whose rows are packed.
    """
    return unwritten(call, inputs, scale) or misfit(call, inputs, cotangents)


def unwritten(call: Call, inputs: Inputs, scale: float) -> str | None:
    """What of a call the kernels are not written for, however its tensors lie in memory.

    A tangent of v alone makes no tangent of the scores. The kernels would multiply zeros for it: 0.91 ms at
    1,24,4096,128 in bfloat16, where the portable ones, compiled without those products, take 0.71 ms.
    """
    (width, *_), (value_width, *_) = call.k_columns, call.v_columns
    aligned = width % 8 == 0 and value_width % 8 == 0 and value_width > 0
    maskable = call.mask is None or can_pack(call)
    if call.seed is not None:
        return "dropout"
    if isinstance(call.pattern, Listed):
        if call.precision == "tf32":  # the scales would be those of rows that nobody sees, too
            return "a block mask of float32 tensors"
        if environment.triton_release() not in MEASURED:
            return f"a block mask with another Triton than {', '.join('.'.join(map(str, x)) for x in MEASURED)}"
    if call.precision == "half" and inputs.v_t is not None and inputs.q_t is None and inputs.k_t is None:
        return "a tangent of v alone, for which the portable kernels are faster"
    if aligned and maskable and len(call.batch_shape) == 1 and scale > 0:
        return None
    if width % 8 != 0:
        return f"D={width} is not a multiple of 8: pad q, k, v with zeros (and give scale=D**-0.5)"
    if value_width % 8 != 0 or value_width == 0:
        return f"Dv={value_width} is not a positive multiple of 8: pad v with zeros"
    if not maskable:
        return "a mask of too many queries and keys" if _is_boolean(call.mask_tensor) else "an additive mask"
    if len(call.batch_shape) != 1:
        return f"{len(call.batch_shape)} batch dims: flatten them to one"
    return f"a scale that is not positive, {scale}"


def misfit(call: Call, inputs: Inputs, cotangents: tuple[Maybe, ...]) -> str | None:
    """Which tensor the kernels cannot address, and how to mend it. What is scaled is copied anyway."""
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


def fits(x: Tensor) -> bool:
    """Whether TMA can address a tensor's rows: aligned to 16 bytes, unit column stride, no broadcast dims."""
    *outer, column = x.stride()
    return column == 1 and x.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in outer
    )  # fmt: skip


def can_pack(call: Call) -> bool:
    """Whether the call's mask is boolean, and 32 bits count the words of a head (packed_mask.py)."""
    m, n = call.sizes.queries, call.sizes.keys
    return _is_boolean(call.mask_tensor) and (m + BLOCK) * (n + BLOCK) < 1 << 36


def _is_boolean(mask: Maybe) -> bool:
    """A boolean mask comes as bytes."""
    return mask is not None and mask.element_size() == 1


def _mended(name: str, how: str) -> str:
    """A user holds the inputs, and of the gradients the loss that they come from."""
    return f"{name}.{how}() mends it" if name in Inputs._fields else "a loss that is no plain sum of outputs mends it"
