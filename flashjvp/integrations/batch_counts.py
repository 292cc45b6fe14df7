"""What stands for the forward passes of batch norm modules, which count their batches in place.

Transforms as torch.func.jvp refuse that of a tensor from outside. Here the module counts with a tensor of the
transform, and what it counted is then added to its own.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from .active import present

Function = Callable[..., Any]
_ANY_BATCH_NORM = nn.BatchNorm1d.__base__
_COUNTER = "num_batches_tracked"
_MADE: dict[Function, Function] = {}


def replacements() -> Mapping[Function, Function]:
    """The forward passes of loaded classes that count, each with what stands for it."""
    for kind in _kinds(_ANY_BATCH_NORM):
        forward = vars(kind).get("forward")
        if not isinstance(forward, types.FunctionType) or _COUNTER not in forward.__code__.co_names:
            continue
        if forward not in _MADE and forward not in _MADE.values():
            _MADE[forward] = _standing_for(forward)
    return _MADE


def _kinds(kind: Any) -> Iterator[Any]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _kinds(derived)


def _standing_for(stock: Function) -> Function:
    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context, counter = present(), self._buffers.get(_COUNTER)
        if context is None or not context.norms or not self.training or counter is None:
            return stock(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return _traced(stock, self, counter, *args, **kwargs)
        if not _torch.transforms_active() or _torch.is_wrapped(counter):
            return stock(self, *args, **kwargs)
        before, count = counter + 0, counter + 0
        view = object.__new__(type(self))  # other threads may run the module, too
        vars(view).update(vars(self), _buffers={**self._buffers, _COUNTER: count})
        try:
            return stock(view, *args, **kwargs)
        finally:
            torch.add(counter, count - before, out=counter)

    return forward


def _traced(stock: Function, module: Any, counter: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The same in terms that torch.compile knows: it undoes what is undone here before the graph runs."""
    before, count = counter + 0, counter + 0
    module._buffers[_COUNTER] = count
    try:
        return stock(module, *args, **kwargs)
    finally:
        module._buffers[_COUNTER] = counter
        torch.add(counter, count - before, out=counter)
