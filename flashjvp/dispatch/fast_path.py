"""The fast path: a call like an earlier one skips the checks and PyTorch's dispatcher, which take longer than a launch.

"Like" means the same options and equal tensor metadata (guards.py). A call is remembered if the checks passed its
tensors on unchanged and the dispatcher led straight to a backend. Later ones record the same autograd node and call the
backend at once. Under transforms, dual levels, modes, tracing and profiling every call takes the dispatcher, since
those watch it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch.eager import KEYSETS, is_plain, may_hold_tangents, without_autocast
from .._torch.guards import TensorKeyedCache
from ..operands import AnyOperands, Options
from . import derivatives, operators
from .schema import Operator

Maybe = Tensor | None
Run = Callable[[Sequence[Maybe]], Any]
View = Callable[[Sequence[Maybe]], Sequence[Maybe]]

_CAN_SKIP_DISPATCHER = derivatives.BY_LEVEL and _torch.CAN_SKIP_DISPATCHER
_KNOWN: TensorKeyedCache[Run] = TensorKeyedCache()


def find(operator: Operator, tensors: Sequence[Any], options: Sequence[Any], enable_gqa: object) -> Run | None:
    """What gives the results of an operator, if a call like this one was kept.

    `tensors` and `options` are as the operator takes them: tuples, since making a record of them takes as long as all
    of this. Arguments of wrong types are never like those of a call that was kept.
    """
    key = _key(operator, tensors, options, enable_gqa)
    return None if key is None else _KNOWN.find(key, [x for x in tensors if x is not None])


def keep(
    operator: Operator, tensors: Sequence[Any], options: Sequence[Any], enable_gqa: object, canonical: AnyOperands
) -> None:
    """After a call that raised nothing: remembers it, if its operator took the tensors, `canonical`, as they came.

    The mask and its tangent alone may have been viewed.
    """
    if (key := _key(operator, tensors, options, enable_gqa)) is None:
        return
    changed: dict[str, Any] = {
        name: (x, y) for name, x, y in zip(canonical._fields, tensors, canonical, strict=True) if x is not y
    }  # fmt: skip
    if not changed.keys() <= {"mask", "mask_t"} or any(x.dtype != y.dtype for x, y in changed.values()):
        return
    device = canonical.q.device.type
    if device not in KEYSETS:  # a meta tensor, say
        return
    if not _KNOWN.saw(key):
        return
    view = _masks_viewed_as(operator, canonical.mask.shape) if changed and canonical.mask is not None else None
    autocast = torch.is_autocast_enabled(device)  # the casts were made, or the tensors would not be as they came
    run = _run(operator, canonical, Options(*options), view, autocast)  # mutate: run
    given = [x for x in tensors if x is not None]
    with without_autocast():
        if is_plain(given):
            _KNOWN.keep(key, given, run)


def _key(
    operator: Operator, tensors: Sequence[Any], options: Sequence[Any], enable_gqa: object
) -> tuple[Any, ...] | None:
    """None where a call has to take the dispatcher, or may have an argument of a wrong type."""
    # In this order: torch.compile, which the first one sees, could not trace the second.
    if not _CAN_SKIP_DISPATCHER or _torch.is_watched() or may_hold_tangents():
        return None
    q, k, *_ = tensors
    is_causal, scale, backend = options
    if type(q) is not Tensor or type(k) is not Tensor or type(is_causal) is not bool or type(enable_gqa) is not bool:
        return None
    if not (scale is None or type(scale) is float) or not (backend is None or type(backend) is str):
        return None
    try:
        # mutate: return operator options
        return operator, options, enable_gqa, q.shape, k.shape, *[None if x is None else x.is_nested for x in tensors]
    except (AttributeError, RuntimeError):  # no tensor, or a nested one, which has no shape and ends guards in C++
        return None


def _run(operator: Operator, operands: AnyOperands, options: Options, view: View | None, autocast: bool) -> Run:
    """The operator without the dispatcher, for tensors like these."""
    below = operators.bound(operator, operands, options, autocast=autocast)
    if any(x is not None and x.requires_grad for x in operands):
        gradients = _BoundGradients(options)  # mutate: gradients
        return derivatives.recorded(operator, below, gradients, view)
    return below if view is None else lambda tensors: below(view(tensors))


def _masks_viewed_as(operator: Operator, shape: torch.Size) -> View:
    """For masks, and their tangents, without the leading dims of size 1 that operators take."""
    fields = operator.operands._fields
    first, last = fields.index("mask"), fields.index("seed")

    def view(tensors: Sequence[Maybe]) -> Sequence[Maybe]:
        masks = [None if x is None else x.view(shape) for x in tensors[first:last]]
        return *tensors[:first], *masks, *tensors[last:]

    return view


class _BoundGradients:
    """The backward operator of all nodes of a forward that is called this way.

    It skips the dispatcher, too, where tensors like these were seen to be plain and record no node. What a node saved
    is compared again: hooks may have put other tensors in its place.
    """

    def __init__(self, options: Options) -> None:
        self._options, self._dispatched = options, derivatives.Gradients(options)
        self._known: TensorKeyedCache[Run] = TensorKeyedCache()

    def __call__(self, operator: Operator, tensors: Sequence[Maybe], wanted: tuple[bool, ...]) -> Sequence[Maybe]:
        """The gradients that are wanted, and None for the others."""
        if torch.is_grad_enabled() or _torch.is_watched() or may_hold_tangents():
            return self._dispatched(operator, tensors, wanted)
        given = [x for x in tensors if x is not None]
        key = wanted, tuple([x is None for x in tensors])
        if (below := self._known.find(key, given)) is None:
            if is_plain(given):
                below = operators.bound(operator, operator.operands(*tensors), self._options, wanted)
                self._known.keep(key, given, below)
            return self._dispatched(operator, tensors, wanted)
        grads: Sequence[Maybe] = below(tensors)
        return grads


def forget() -> None:
    """Every call is as the first."""
    _KNOWN.clear()
