"""Which finding an error of PyTorch stands for, that a JVP of a model or a backward pass through it raised."""

import re

from . import advice
from .observe import Observer, Place

_FORWARD_AD = re.compile(r"Trying to use forward AD with (?:aten::)?(\w+)")
_NO_DERIVATIVE = re.compile(r"derivative for aten::(\w+) is not implemented")
_OPERATOR = re.compile(r"operation \(aten::(\w+)")
_FAST_PATHS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
_MOST_OF_A_MESSAGE = 160


def place(error: Exception, seen: Observer) -> Place:
    """What refused, and where."""
    where = seen.raised_in(error)
    message = str(error)
    detail = f"{type(error).__name__}: {message.splitlines()[0] if message else ''}"[:_MOST_OF_A_MESSAGE]
    if found := _FORWARD_AD.search(message):
        operator = found.group(1)
        if "scaled_dot_product" in operator:
            return Place(advice.SDPA, *where)
        return Place(advice.FAST_PATH if operator in _FAST_PATHS else advice.NO_FORWARD_AD, *where, operator)
    if found := _NO_DERIVATIVE.search(message):
        operator = found.group(1)
        called = seen.operators.get(operator, Place("", *where))
        return called._replace(kind=advice.NO_BACKWARD, detail=operator)
    if "would mutate a captured Tensor" in message:
        written = _OPERATOR.search(message)
        return Place(advice.IN_PLACE, *where, written.group(1) if written else "")
    if "view size is not compatible" in message:
        return Place(advice.STRIDED, *where)
    for kind in (advice.CHECKPOINT, advice.FUNCTION):
        known = [seen_at for seen_at in seen.calls if seen_at.kind == kind]
        if known:
            return known[-1]
    return Place(advice.ERROR, *where, detail)
