"""Functions of packages that flashjvp does not need: replaced if somebody imported them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Function = Callable[..., Any]


class Package:
    """The modules of a package that have functions to replace, and by name what makes a replacement of the stock."""

    def __init__(self, modules: Sequence[str], makers: Mapping[str, Callable[[Function], Function]]) -> None:
        self._modules, self._makers = modules, makers
        self._made: dict[Function, Function] = {}

    def replacements(self) -> Mapping[Function, Function]:
        """The functions that are loaded, or once were, each with what stands for it."""
        for module in (sys.modules.get(name) for name in self._modules):
            for name, make in self._makers.items():
                function = getattr(module, name, None)
                if function is not None and function not in self._made.values() and function not in self._made:
                    self._made[function] = make(function)
        return self._made
