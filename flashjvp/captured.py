"""The tensors that a function brings along: in the arguments of a partial, or in the variables of a closure.

What recomputes a function later needs all tensors that have tangents as arguments, wherever they were kept.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from . import _torch
from .errors import UnsupportedError

Rebuild = Callable[[Sequence[Any]], Any]


def lifted(function: Callable[..., Any]) -> tuple[list[Tensor], Rebuild]:
    """The tensors with tangents that a function brings along, and what makes it anew with others in their places."""
    found: list[Tensor] = []
    rebuild = _open(function, found, set())
    return found, rebuild or (lambda _: function)


def _open(x: Any, found: list[Tensor], seen: set[int]) -> Rebuild | None:
    """Adds to `found`; what makes x anew from as many tensors, or None where x holds none."""
    if isinstance(x, Tensor):
        if not _torch.carries_tangent(x):
            return None
        place = len(found)
        found.append(x)
        return lambda tensors: tensors[place]
    if isinstance(x, nn.Module | types.MethodType):
        _check_module(getattr(x, "__self__", x))
        return None
    if id(x) in seen or x is None or isinstance(x, str | int | float | type):
        return None
    seen.add(id(x))
    if isinstance(x, functools.partial):
        of_partial = _open_all([x.func, x.args, x.keywords], found, seen)
        return None if of_partial is None else (lambda tensors: _partial(*of_partial(tensors)))
    if isinstance(x, types.FunctionType):
        return _open_closure(x, found, seen)
    if type(x) in (tuple, list, dict):
        leaves, spec = _torch.pytree.tree_flatten(x)
        parts = _open_all(leaves, found, seen)
        return None if parts is None else (lambda tensors: _torch.pytree.tree_unflatten(parts(tensors), spec))
    return None


def _open_all(parts: Sequence[Any], found: list[Tensor], seen: set[int]) -> Callable[[Sequence[Any]], list[Any]] | None:
    opened = [_open(part, found, seen) for part in parts]
    if not any(opened):
        return None
    pairs: list[tuple[Any, Rebuild | None]] = list(zip(parts, opened, strict=True))
    return lambda tensors: [rebuild(tensors) if rebuild else part for part, rebuild in pairs]


def _open_closure(function: types.FunctionType, found: list[Tensor], seen: set[int]) -> Rebuild | None:
    cells = function.__closure__ or ()
    opened = [_open(_content(cell), found, seen) for cell in cells]
    if not any(opened):
        return None

    def rebuild(tensors: Sequence[Any]) -> Any:
        new = tuple(types.CellType(make(tensors)) if make else cell for cell, make in zip(cells, opened, strict=True))
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, new
        )
        made.__kwdefaults__ = function.__kwdefaults__
        return made

    return rebuild


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def _partial(function: Any, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
    return functools.partial(function, *args, **keywords)


def _check_module(module: object) -> None:
    if isinstance(module, nn.Module) and any(
        _torch.carries_tangent(x) for tensors in (module.parameters(), module.buffers()) for x in tensors
    ):
        raise UnsupportedError(
            "function: expected a module whose parameters have no tangents (they would be others when it is "
            f"recomputed), got a {type(module).__name__} with some: pass them as arguments, through "
            "torch.func.functional_call"
        )
