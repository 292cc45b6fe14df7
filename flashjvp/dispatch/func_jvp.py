"""Calls `attention_jvp` for `attention` under torch.func.jvp: one launch, and no way through functorch's dispatcher.

It unwraps primals and tangents, leaves the transform, calls `attention_jvp`, enters the transform again and wraps o and
o_t into a dual tensor. functorch itself would wrap the arguments at every level and enter Python twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _torch
from .._torch.eager import marked
from . import derivatives

Maybe = Tensor | None
_JVP = _torch.JVP if derivatives.BY_LEVEL and _torch.CAN_CALL_BELOW_JVP else None


def under_jvp(
    attention_jvp: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any], mask: Any, **options: Any
) -> Tensor | None:
    """The dual o of q, k, v where func.jvp is the innermost transform and gives one of them, or the mask, a tangent,
    else None.

    `attention_jvp` is called below the transform: with primals and tangents in place of the tensors.
    """
    if _JVP is None or not _torch.transforms_active() or _torch.is_watched() or _torch.dispatch_modes():
        return None
    transform = _torch.innermost_transform()
    if transform.key().value != _JVP:
        return None
    level, primals = transform.level(), []
    tangents: list[Maybe] = []
    for x in tensors if mask is None else (*tensors, mask):
        if type(x) is not Tensor:
            return None
        x = _torch.unwrap_if_dead(x)  # what was kept from a transform that is over
        primal = _torch.unwrap_level(x, level)
        primals.append(primal)
        if primal is x:  # not of this level, and so without a tangent there; what outer levels record is recorded below
            tangents.append(None)
        elif x.requires_grad:  # at this level, where only an operator is recorded
            return None
        else:
            tangents.append(_tangent(x, level))  # mutate: tangents.append
    if all([x is None for x in tangents]) or not _torch.JvpInterpreter(transform).prevFwdGradMode():
        return None
    if mask is not None:
        options |= {"attn_mask": primals.pop(), "attn_mask_t": tangents.pop()}  # mutate: options
    layer = _torch.pop_transform()
    try:
        with marked("below_jvp"):
            o, o_t = attention_jvp(*primals, *tangents, **options)
    finally:
        _torch.push_transform(layer)
    return _torch.make_dual(o, o_t)  # mutate: return _torch make_dual


def _tangent(x: Tensor, level: int) -> Maybe:
    """As `level` wraps it, taken out. A choice of keys has none."""
    tangent = _torch.unpack_dual(x)[1] if x.is_floating_point() else None
    return None if tangent is None else _torch.unwrap_level(tangent, level)
