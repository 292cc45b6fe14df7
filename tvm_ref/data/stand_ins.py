"""Stands in for tensors and their storages while an untrusted pickle is loaded: nothing is allocated before checks."""

import math
from typing import Any

import torch
from torch import Tensor

from .untrusted import shown

STORAGES = {
    "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32,
    "Long": torch.int64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32,
    "Double": torch.float64,
}  # fmt: skip


class UnsafePickleError(ValueError):
    """A pickle is damaged, or names something other than tensors, arrays and plain containers."""


class StandIn:
    """An object whose attributes a pickle cannot set."""

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError(f"pickle: expected no state for {type(self).__name__}, got some")


class Builder(StandIn):
    """Calls a function of ours in place of the one that the pickle names."""

    def __init__(self, build: Any) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        """Builds the object that the pickle describes by `arguments`."""
        return self._build(*arguments)


class StorageType(StandIn):
    """Stands in for the class of a storage, such as torch.FloatStorage."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Storage(StandIn):
    """`count` numbers of one dtype. Their bytes may follow later."""

    def __init__(self, dtype: torch.dtype, count: int) -> None:
        self.dtype, self.count = dtype, count
        self._numbers: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes of all numbers."""
        return self.count * self.dtype.itemsize

    def fill(self, content: bytes) -> None:
        """Gives the storage its bytes. Raises UnsafePickleError for another number of them than it states."""
        if len(content) != self.size:
            raise UnsafePickleError(f"storage: expected {self.size} bytes, got {len(content)}")
        empty = torch.empty(0, dtype=self.dtype)
        self._numbers = torch.frombuffer(bytearray(content), dtype=self.dtype) if content else empty

    def numbers(self) -> Tensor:
        """All numbers, [count]. Raises UnsafePickleError if their bytes are missing."""
        if self._numbers is None:
            raise UnsafePickleError(f"storage: expected {self.size} bytes, got none")
        return self._numbers


class View(StandIn):
    """Stands in for a tensor: numbers of a storage, given by offset, size and stride."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> None:
        if not isinstance(storage, Storage):
            raise UnsafePickleError(f"tensor: expected a storage, got {type(storage).__name__}")
        if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 64):
            raise UnsafePickleError("tensor: expected offset, size and stride, got others")
        for number in (offset, *size, *stride):
            if type(number) is not int or not 0 <= number < 2**62:
                raise UnsafePickleError(f"tensor: expected offset, size and stride, got the number {shown(number)}")
        wanted = math.prod(size)
        if wanted > storage.count:  # strides that name the same number twice can ask for any amount of memory
            raise UnsafePickleError(f"tensor: expected at most {storage.count} numbers, as are stored, got {wanted}")
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if wanted else 0
        if reach > storage.count:
            raise UnsafePickleError(f"tensor: expected {reach} stored numbers, got {storage.count}")
        self._storage, self._offset, self._size, self._stride = storage, offset, size, stride

    def tensor(self) -> Tensor:
        """The tensor, which shares the memory of the storage."""
        numbers = self._storage.numbers()
        if not math.prod(self._size):
            return torch.empty(self._size, dtype=numbers.dtype)
        return numbers.as_strided(self._size, self._stride, self._offset)
