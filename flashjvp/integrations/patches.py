"""Puts functions in the place of others wherever modules refer to them, while at least one context wants it.

The functions that are put there ask which context their caller is in, and do what PyTorch does outside of any.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .references import Reference, in_attributes, in_loaded_modules

Function = Callable[..., Any]
Place = tuple[Reference, Function, Function]  # and what is there without, and with, a context


class Patches:
    """Pairs of functions, of which the first are replaced by the second from the first `hold` to the last `release`."""

    def __init__(self, replacements: Callable[[], Mapping[Function, Function]]) -> None:
        self._replacements = replacements
        self._lock = threading.RLock()
        self._holders = 0
        self._known: dict[int, Any] = {}  # the modules that were looked through
        self._of: set[Function] = set()  # for these functions
        self._references: list[Place] = []
        self._of_models: list[Place] = []

    def hold(self, namespaces: Iterable[dict[str, Any]] = ()) -> None:
        """Each function is replaced, also in modules that were loaded since somebody else did this.

        `namespaces` are those of a model's modules, where it may keep functions, too.
        """
        with self._lock:
            pairs = dict(self._replacements())
            if set(pairs) != self._of:
                self._known, self._of = {}, set(pairs)
            if self._holders == 0:
                _put([(reference, old, new) for reference, old, new in self._references])
            self._references += self._put_in_new_modules(pairs)
            by_id = _by_id(pairs)
            self._of_models += _replace([x for names in namespaces for x in in_attributes(names, by_id)], by_id)
            self._holders += 1

    def release(self) -> None:
        """What was replaced is as it was, if nobody else holds it, also in modules that were loaded meanwhile."""
        with self._lock:
            self._holders -= 1
            if self._holders > 0:
                return
            _put([(reference, new, old) for reference, old, new in (*self._references, *self._of_models)])
            self._of_models = []
            back = {new: old for old, new in self._replacements().items()}
            self._references += [(reference, old, new) for reference, new, old in self._put_in_new_modules(back)]

    def _put_in_new_modules(self, pairs: Mapping[Function, Function]) -> list[Place]:
        by_id = _by_id(pairs)
        return _replace(in_loaded_modules(by_id, self._known), by_id)


def _by_id(pairs: Mapping[Function, Function]) -> dict[int, tuple[Function, Function]]:
    return {id(old): (old, new) for old, new in pairs.items()}


def _replace(references: Iterable[Reference], by_id: Mapping[int, tuple[Function, Function]]) -> list[Place]:
    found = [(reference, *by_id[id(reference.get())]) for reference in references]
    _put(found)
    return found


def _put(places: list[Place]) -> None:
    """The second function where the first one still is."""
    for reference, old, new in places:
        if reference.get() is old:
            reference.put(new)
