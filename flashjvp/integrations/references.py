"""Finds where loaded modules refer to a function, by identity: from-imports, attributes of classes, default arguments,
functools.partial, and lists and dicts at the top of a module."""

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# Modules of PyTorch that tell functions apart by identity, or hold those that graphs are made of.
_LEFT_ALONE = (
    "flashjvp.", "torch._C", "torch._decomp", "torch._dynamo", "torch._functorch", "torch._higher_order_ops",
    "torch._inductor", "torch._jit", "torch._ops", "torch._prims", "torch._refs", "torch._subclasses", "torch.ao",
    "torch.export", "torch.fx", "torch.jit", "torch.onnx", "torch.overrides", "torch.testing",
)  # fmt: skip
_LONGEST = 1000  # of a list or dict at the top of a module that is looked through


class Reference(NamedTuple):
    """One place that refers to a function."""

    get: Callable[[], Any]
    put: Callable[[Any], None]


def in_loaded_modules(wanted: Mapping[int, Any], known: dict[int, Any]) -> Iterator[Reference]:
    """References to functions whose ids are the keys of `wanted`, in modules that changed since `known` saw them."""
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or f"{name}.".startswith(_LEFT_ALONE):
            continue
        attributes = vars(module)
        seen = known.get(id(module))
        if seen is None or seen[0] is not module or seen[1] != len(attributes):
            known[id(module)] = module, len(attributes)
            yield from _in_module(name, attributes, wanted)


def in_attributes(attributes: dict[str, Any], wanted: Mapping[int, Any]) -> Iterator[Reference]:
    """References in a namespace, those in partials, lists and dicts included."""
    for name, value in list(attributes.items()):
        if id(value) in wanted:
            yield _item(attributes, name)
        elif type(value) is functools.partial:
            yield from _in_partial(value, wanted)
        elif type(value) in (list, dict) and len(value) <= _LONGEST:
            pairs = enumerate(value) if type(value) is list else list(value.items())
            yield from (_item(value, key) for key, inner in pairs if id(inner) in wanted)


def _in_module(name: str, attributes: dict[str, Any], wanted: Mapping[int, Any]) -> Iterator[Reference]:
    yield from in_attributes(attributes, wanted)
    for value in list(attributes.values()):
        if type(value) is types.FunctionType and value.__module__ == name:
            yield from _in_defaults(value, wanted)
        elif issubclass(type(value), type) and value.__module__ == name:
            yield from _in_class(value, wanted)


def _in_class(owner: type, wanted: Mapping[int, Any]) -> Iterator[Reference]:
    for name, value in list(vars(owner).items()):
        if id(value) in wanted:
            yield _attribute(owner, name, value)
        elif type(value) is staticmethod and id(value.__func__) in wanted:
            yield _attribute(owner, name, value.__func__)
        elif type(value) is types.FunctionType:
            yield from _in_defaults(value, wanted)
        elif type(value) is functools.partial:
            yield from _in_partial(value, wanted)


def _in_defaults(function: types.FunctionType, wanted: Mapping[int, Any]) -> Iterator[Reference]:
    for i, value in enumerate(function.__defaults__ or ()):
        if id(value) in wanted:
            yield _default(function, i)
    for name, value in (function.__kwdefaults__ or {}).items():
        if id(value) in wanted:
            yield _item(function.__kwdefaults__, name)


def _in_partial(partial: Any, wanted: Mapping[int, Any]) -> Iterator[Reference]:
    def put(value: Any) -> None:
        partial.__setstate__((value, partial.args, partial.keywords, partial.__dict__))

    if id(partial.func) in wanted:
        yield Reference(lambda: partial.func, put)


def _item(container: Any, key: Any) -> Reference:
    def get() -> Any:
        try:
            return container[key]
        except LookupError:
            return None

    return Reference(get, functools.partial(container.__setitem__, key))


def _attribute(owner: type, name: str, function: Any) -> Reference:
    """Of a class. A builtin is no method there; what stands for it must be none either."""
    stored = vars(owner)[name]
    is_method = type(stored) is types.FunctionType

    def get() -> Any:
        value = vars(owner).get(name)
        return value.__func__ if type(value) is staticmethod else value

    def put(value: Any) -> None:
        setattr(owner, name, stored if value is function else value if is_method else staticmethod(value))

    return Reference(get, put)


def _default(function: types.FunctionType, i: int) -> Reference:
    def get() -> Any:
        defaults = function.__defaults__ or ()
        return defaults[i] if i < len(defaults) else None

    def put(value: Any) -> None:
        defaults = list(function.__defaults__ or ())
        defaults[i] = value
        function.__defaults__ = tuple(defaults)

    return Reference(get, put)
