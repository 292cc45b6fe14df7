"""Makes Triton's interpreter about three times as fast, with the same results bit by bit.

It puts its own functions in the place of the language's when a kernel is launched, and again at each call of a device
function, which takes as long as what these compute. Here a launch does so for each module of the language. It also
finds out whether integers overflow, and says nothing of it unless it debugs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def hasten() -> None:
    """From here on, in this process, with TRITON_INTERPRET=1. A Triton with other names stays as slow as it is."""
    try:
        builder = interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
        prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    except (AttributeError, TypeError):
        return
    builder.options = options
    prepared: set[str] = set()

    @functools.wraps(prepare)
    def prepare_once(function: Callable[..., Any]) -> Any:
        modules = _modules(function)
        if modules and modules <= prepared:
            return None  # only a launch looks at it, whose call is the first
        prepared.update(modules)
        return prepare(function)

    @functools.wraps(launch)
    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch_anew


@functools.cache
def _modules(function: Callable[..., Any]) -> frozenset[str]:
    """The modules of the language that a function sees."""
    seen = {id(value) for value in function.__globals__.values()}
    return frozenset(module.__name__ for module in (tl, tl.core) if id(module) in seen)
