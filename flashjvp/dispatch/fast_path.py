"""The fast path: a call like an earlier one skips the checks and PyTorch's dispatcher, which take longer than a launch.

"Like" means the same options and equal tensor metadata (guards.py). A call is remembered if the checks passed its
tensors on unchanged and the dispatcher led straight to a backend. Later ones record the same autograd node and call the
backend at once. Under transforms, dual levels, modes, tracing and profiling every call takes the dispatcher, since
those watch it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

    `tensors` and `options` are as the operator takes them, but for what `keep` is given `joined` for: tuples, since
    making a record of them takes as long as all of this. Arguments of wrong types are never like those of a call that
    was kept.
    """
    key = _key(operator, tensors, options, enable_gqa)
    return None if key is None else _KNOWN.find(key, [x for x in tensors if x is not None])


def keep(
    operator: Operator, tensors: Sequence[Any], options: Sequence[Any], enable_gqa: object, canonical: AnyOperands,
    joined: View | None = None,
) -> None:  # fmt: skip
    """After a call that raised nothing: remembers it, if its operator took the tensors, `canonical`, as they came.

    The mask and its tangent alone may have been viewed. Autocast may have cast any. Where what is in the mask's place
    was made of tensors of the call, these follow the inputs, and `joined` gives what the operator takes.
    """
    if (key := _key(operator, tensors, options, enable_gqa)) is None:
        return
    masks = canonical._fields.index("mask")
    taken = tensors if joined is None else (*tensors[:masks], *canonical[masks:])
    plain = [x for x in taken if x is not None]
    if plain[0].device.type not in KEYSETS:  # a meta tensor, say
        return
    pairs: list[tuple[str, Any, Any]] = list(zip(canonical._fields, taken, canonical, strict=True))
    if any(x is not y and x.shape != y.shape for name, x, y in pairs if name not in ("mask", "mask_t")):
        return
    if not _KNOWN.saw(key):
        return
    changes = [_Change.of(place, x, y) for place, (_, x, y) in enumerate(pairs) if x is not y]
    run = _run(operator, canonical, plain, Options(*options), _view(joined, changes))  # mutate: run
    with without_autocast():
        if not is_plain(plain):
            return
    _KNOWN.keep(key, [x for x in tensors if x is not None], run)


def _key(
    operator: Operator, tensors: Sequence[Any], options: Sequence[Any], enable_gqa: object
) -> tuple[Any, ...] | None:
    """None where a call has to take the dispatcher, or may have an argument of a wrong type."""
    # In this order: torch.compile, which the first one sees, could not trace the second.
    if not _CAN_SKIP_DISPATCHER or _torch.is_watched() or may_hold_tangents():
        return None
    q, k = tensors[0], tensors[1]
    is_causal, scale, backend = options
    if type(q) is not Tensor or type(k) is not Tensor or type(is_causal) is not bool or type(enable_gqa) is not bool:
        return None
    if not (scale is None or type(scale) is float) or not (backend is None or type(backend) is str):
        return None
    try:
        autocast = torch.get_autocast_dtype("cuda" if q.is_cuda else "cpu")  # a guard sees whether it is on
        nested = [None if x is None else x.is_nested for x in tensors]
        return operator, options, enable_gqa, autocast, q.shape, k.shape, *nested  # mutate: return operator options
    except (AttributeError, RuntimeError):  # no tensor, or a nested one, which has no shape and ends guards in C++
        return None


def _run(
    operator: Operator, operands: AnyOperands, plain: Sequence[Tensor], options: Options, view: View | None
) -> Run:
    """The operator without the dispatcher, for tensors like those that are `plain`, after `view` made operands."""
    autocast = torch.is_autocast_enabled(plain[0].device.type)
    below = operators.bound(operator, operands, options, autocast=autocast)
    if any([x.requires_grad for x in plain]):
        gradients = _BoundGradients(options)  # mutate: gradients
        return derivatives.recorded(operator, below, gradients, view)
    return below if view is None else lambda tensors: below(view(tensors))


def _view(joined: View | None, changes: "Sequence[_Change]") -> View | None:
    """What makes operands of the tensors of a call; None where it is nothing."""
    if joined is None:
        return functools.partial(_changed, changes) if changes else None
    return lambda tensors: _changed(changes, joined(tensors))


class _Change(NamedTuple):
    """What becomes of a tensor before an operator takes it: a cast, and of a mask leading dims of size 1."""

    place: int
    dtype: torch.dtype | None
    shape: torch.Size | None

    @classmethod
    def of(cls, place: int, x: Tensor, y: Tensor) -> "_Change":
        return cls(place, None if x.dtype == y.dtype else y.dtype, None if x.shape == y.shape else y.shape)


def _changed(changes: Sequence[_Change], tensors: Sequence[Maybe]) -> Sequence[Maybe]:
    made: list[Any] = [*tensors]
    for place, dtype, shape in changes:
        x = made[place] if dtype is None else made[place].to(dtype)
        made[place] = x if shape is None else x.view(shape)
    return made


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
        key = wanted, tensors[0] is None, tensors[1] is None  # cotangents: all else is there for every node or none
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
