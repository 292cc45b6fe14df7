"""Which modules of a model look like attention: by the names of their classes, or by a softmax between products."""

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


def modules(model: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """Those that hold no other such module, each with its name."""
    if model is None:
        return []
    kinds: dict[nn.Module, Any] = {module: type(module) for module in model.modules()}
    found = [(name, module) for name, module in model.named_modules() if _looks_like_it(kinds[module])]
    return [
        (name, module) for name, module in found
        if not any(other is not module and other in set(module.modules()) for _, other in found)
    ]  # fmt: skip


@functools.cache
def _looks_like_it(kind: Any) -> bool:
    name = kind.__name__.lower()
    if "attention" in name or name.endswith("attn"):
        return True
    names = set().union(*map(_names, _codes(kind)))
    return "softmax" in names and not names.isdisjoint({*_PRODUCTS, "@"})


def _codes(kind: type[nn.Module]) -> Iterator[types.CodeType]:
    """Of the methods of a class, but for those of PyTorch's own classes."""
    for owner in kind.__mro__:
        if owner.__module__.split(".")[0] != "torch":
            yield from (value.__code__ for value in vars(owner).values() if isinstance(value, types.FunctionType))


def _names(code: types.CodeType) -> set[str]:
    """What a function refers to by name, and its operators."""
    operators = {step.argrepr for step in dis.get_instructions(code) if step.opname == "BINARY_OP"}
    inner: Any = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names, *operators}.union(*map(_names, inner))
