"""Functions of a backend for tensors [*batch, rows, H, D], as packed sequences are given, from those for [*batch, H,
rows, D].

Nothing but views is made, of which a replayed call (kernels/launch/replay.py) makes none. Row statistics, which nobody
else reads, stay as they lie in memory: their shape is [*batch, rows, H], their order that of [*batch, H, rows].
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from ..operands import BackwardOperands, Gradients, Operands, PlainBackwardOperands, PlainOperands

Maybe = Tensor | None
P = ParamSpec("P")
Results = TypeVar("Results", bound=tuple[Any, ...])

_STATISTICS, _STAY = ("lse", "mu"), ("mask", "mask_t", "seed")
RESULTS: dict[Any, tuple[str, ...]] = {
    PlainOperands: ("o", "lse"), Operands: ("o", "o_t", "lse", "mu"),
    PlainBackwardOperands: ("q", "k", "v", "mask"), BackwardOperands: Gradients._fields,
}  # fmt: skip


def rows_first(record: Any) -> Callable[[Callable[P, Results]], Callable[P, Results]]:
    """Of a function whose first arguments are the tensors of a record of operands.py. It is given a batch dim where
    there is none."""
    count, names = len(record._fields), RESULTS[record]

    def decorate(function: Callable[P, Results]) -> Callable[P, Results]:
        of_heads_first: Callable[..., Results] = function

        @functools.wraps(function)
        def run(*args: P.args, **none: P.kwargs) -> Results:
            x: dict[str, Any] = dict(zip(record._fields, args, strict=False))
            found = of_heads_first(*[_heads_first(name, y) for name, y in x.items()], *args[count:])
            results: Any = tuple([
                _rows_first(name, y, x.get(name, x["q"])) for name, y in zip(names, found, strict=True)
            ])  # fmt: skip
            return results

        return run

    return decorate


def _heads_first(name: str, x: Maybe) -> Maybe:
    if x is None or name in _STAY:
        return x
    if name in _STATISTICS:
        *batch, rows, heads = x.shape
        return x.reshape(*(batch or (1,)), heads, rows)  # mutate: return x reshape
    x = x.transpose(-2, -3)
    return x.unsqueeze(0) if x.ndim == 3 else x


def _rows_first(name: str, x: Maybe, like: Tensor) -> Maybe:
    """A result, laid out as layout.py says for what is like it: a gradient's tensor, or q. To autograd it is no view,
    and neither are those of a replayed call."""
    if x is None or name in _STAY:
        return x
    if name in _STATISTICS:
        return x.reshape(like.shape[:-1]).detach()
    x = x.transpose(-2, -3)
    x = x.squeeze(0) if like.ndim == 3 else x
    if like.stride(-2) == like.stride(-3):  # broadcast in both dims: nothing tells which of them is first in memory
        x = x.contiguous()
    return x.detach()
