"""Which of a model's modules that look like attention calls came from, as the callers' frames tell."""

import inspect
import math
import random
import sys
import types
from collections.abc import Iterator

from torch import nn

from . import like_attention

_DEEPEST = 20  # frames between attention and the module that calls it
_STRANGERS = 2  # modules that are not of the model, after which the search ends
_ROUNDS = 8  # looks for each module of a model, in which no new one was seen, before only some calls are looked at
_GAP = 32  # one call in so many, then, on average


class Callers:
    """The modules of a model that look like attention, and those of them from which no call came yet."""

    def __init__(self, model: nn.Module | None) -> None:
        found = like_attention.modules(model)
        self.names = {id(module): name or "(the model)" for name, module in found}
        self.unreached = dict(self.names)
        self._parts = {id(part) for _, module in found for part in module.modules()}
        self._others = set() if model is None else {id(module) for module in model.modules()} - self._parts
        self._codes = {id(code) for _, module in found for code in _codes_of(type(module))}
        self._in_vain = 0
        self._gaps = random.Random(0)  # at random: calls of a model come in periods, which a fixed gap could miss

    def look(self) -> float:
        """Notes which module this call comes from. Returns after how many calls to look again.

        At the next one, until nothing new has been seen for a while. A look costs about 10 us, and a module that no
        call ever comes from would make every call pay for one.
        """
        unreached = len(self.unreached)
        self._look()
        if not self.unreached:
            return math.inf
        self._in_vain = self._in_vain + 1 if len(self.unreached) == unreached else 0
        return 1 if self._in_vain <= _ROUNDS * len(self.names) else self._gaps.randrange(1, 2 * _GAP)

    def _look(self) -> None:
        """Most frames are told by their code alone: it costs more to read what `self` is there.

        The search ends at a module of the model that is no part of any.
        """
        codes, strangers = self._codes, 0
        frame: types.FrameType | None = sys._getframe(3)
        for _ in range(_DEEPEST):
            if frame is None:
                return
            if id(frame.f_code) in codes:
                module = id(frame.f_locals.get("self"))
                if module in self.names:
                    self.unreached.pop(module, None)
                    return
                strangers += module not in self._parts
                if module in self._others or strangers == _STRANGERS:
                    return
            frame = frame.f_back


def _codes_of(kind: type[nn.Module]) -> Iterator[types.CodeType]:
    """What runs when a module of this class is called, or one of its own methods."""
    yield nn.Module.__call__.__code__
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        functions = [value for value in vars(owner).values() if isinstance(value, types.FunctionType)]
        for function in (*functions, *map(inspect.unwrap, functions)):
            if isinstance(function, types.FunctionType):  # what is wrapped may be a builtin
                yield function.__code__
