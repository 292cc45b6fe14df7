"""A cache keyed by tensor metadata.

`TensorGuards` compares types, dispatch keys (and with them modes, transforms, autocast and lazy negation), dtypes,
devices, sizes, strides and requires_grad in C++, never values, in less time than Python takes to read the shapes. It
keeps no tensor alive.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from .. import _torch

Value = TypeVar("Value")
_MOST_KEYS, _MOST_GUARDS = 1 << 10, 8


class TensorKeyedCache(Generic[Value]):
    """Values by a key and by the metadata of a call's tensors. The key tells calls apart by what is cheap to hash.

    The cache is bounded. Threads share it: entries are tuples, replaced as a whole.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[tuple[Any, Value], ...]] = {}

    def find(self, key: Hashable, tensors: Sequence[Tensor]) -> Value | None:
        """The value kept with `key` for tensors like these, whose number follows from the key."""
        for guard, value in self._entries.get(key, ()):
            if guard.check(*tensors):  # mutate: if guard check
                return value
        return None

    def saw(self, key: Hashable) -> bool:
        """Whether the key came before: what comes once is not worth keeping."""
        if key in self._entries:
            return True
        if len(self._entries) >= _MOST_KEYS:
            self._entries.clear()
        self._entries[key] = ()
        return False

    def keep(self, key: Hashable, tensors: Sequence[Tensor], value: Value) -> None:
        """Keeps `value`, and of many kept with one key the latest. Two tensors that are one object never match."""
        if _torch.TensorGuards is not None:  # else nothing is ever kept, and every call takes the long way
            guard = _torch.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self._entries[key] = ((guard, value), *self._entries.get(key, ())[: _MOST_GUARDS - 1])

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
