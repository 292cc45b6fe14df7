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


def under_jvp(attention_jvp: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any]) -> Tensor | None:
    """The dual o of q, k, v where func.jvp is the innermost transform and gives one of them a tangent, else None.

    `attention_jvp` takes q, k, v, q_t, k_t, v_t and is called below the transform.
    """
    if _JVP is None or not _torch.transforms_active() or _torch.is_watched() or _torch.dispatch_modes():
        return None
    transform = _torch.innermost_transform()
    if transform.key().value != _JVP or not all([type(x) is Tensor for x in tensors]):
        return None
    if any([x.requires_grad for x in tensors]):  # at the level of the transform, where only an operator is recorded
        return None
    level = transform.level()
    tangents = [_tangent(x, level) for x in tensors]  # mutate: tangents
    if all([x is None for x in tangents]) or not _torch.JvpInterpreter(transform).prevFwdGradMode():
        return None
    primals = [_torch.unwrap_level(x, level) for x in tensors]
    layer = _torch.pop_transform()
    try:
        with marked("below_jvp"):
            o, o_t = attention_jvp(*primals, *tangents)
    finally:
        _torch.push_transform(layer)
    return _torch.make_dual(o, o_t)  # mutate: return _torch make_dual


def _tangent(x: Tensor, level: int) -> Maybe:
    """As `level` wraps it, taken out."""
    tangent = _torch.unpack_dual(x)[1]
    return None if tangent is None else _torch.unwrap_level(tangent, level)
