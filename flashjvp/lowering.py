"""attention under torch.func.jvp as attention_jvp below it, in Python what functorch does in the dispatcher.

There an operator goes down through every layer with its arguments wrapped, and twice through Python on the way. Here
the tangents are taken off, the transform is left, as a custom Function leaves it, and the results are made dual again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch._C._functorch import (
    CJvpInterpreterPtr,
    TransformType,
    _unwrap_for_grad,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
)

from .eager import is_watched

Maybe = Tensor | None
_unpack_dual, _make_dual = torch._VF._unpack_dual, torch._VF._make_dual
_JVP = TransformType.Jvp.value  # numbers compare in a third of the time that members of this enumeration take


def under_jvp(attention_jvp: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Any]) -> Tensor | None:
    """The dual o of q, k, v where func.jvp is the innermost transform and gives one of them a tangent, else None.

    `attention_jvp` takes q, k, v, q_t, k_t, v_t and is called below the transform.
    """
    if not _are_functorch_transforms_active() or is_watched() or _len_torch_dispatch_stack():
        return None
    transform = peek_interpreter_stack()
    if transform.key().value != _JVP or not all([type(x) is Tensor for x in tensors]):
        return None
    if any([x.requires_grad for x in tensors]):  # at the level of the transform, where only an operator is recorded
        return None
    level = transform.level()
    tangents = [_tangent(x, level) for x in tensors]
    if all([x is None for x in tangents]) or not CJvpInterpreterPtr(transform).prevFwdGradMode():
        return None
    primals = [_unwrap_for_grad(x, level) for x in tensors]
    layer = pop_dynamic_layer_stack()
    try:
        o, o_t = attention_jvp(*primals, *tangents)
    finally:
        push_dynamic_layer_stack(layer)
    dual: Tensor = _make_dual(o, o_t, level=0)
    return dual


def _tangent(x: Tensor, level: int) -> Maybe:
    """As `level` wraps it, taken out; one known to be zero counts as none."""
    tangent = _unpack_dual(x, level=0)[1]
    return None if tangent is None or tangent._is_zerotensor() else _unwrap_for_grad(tangent, level)
