"""Reads an untrusted pickle of tensors, arrays and plain containers without executing anything in it.

A pickle is a program: it names functions, which the standard unpickler imports and calls. `SafeUnpickler` has a fixed
table of allowed names instead. Each is bound to a function of this file that checks its arguments and builds a tensor,
an array or a plain container. Every other name is refused, and nothing is imported.
"""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # module names that pickle protocols 0 to 2 write
DTYPES = ("bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8")


class UnsafePickleError(ValueError):
    """A pickle is damaged, or names something other than tensors, arrays and plain containers."""


class SafeUnpickler(pickle.Unpickler):
    """Allows tensors (on the CPU), torch dtypes, numeric numpy arrays and plain containers; refuses the rest by name.

    Numpy arrays are `Array` objects until `load` replaces them.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Returns the builder for the global `module.name`. Raises UnsafePickleError if it is not in the table."""
        if module == "torch" and name in DTYPES:
            return getattr(torch, name)
        module = PYTHON_2.get(module, module)
        try:
            return ADMITTED[f"{module}.{name}"]
        except KeyError:
            expected = "tensors, arrays and plain containers only"
            raise UnsafePickleError(f"pickle: expected {expected}, got a reference to {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Always raises: references to data outside the file are refused."""
        raise UnsafePickleError(f"pickle: expected a file complete in itself, got the outside reference {pid!r}")


def load(path: Path, unpickler: type[SafeUnpickler] = SafeUnpickler) -> Any:
    """Reads a pickle file. Raises UnsafePickleError, naming the file, if its contents are refused or damaged."""
    with open(path, "rb") as file:
        try:
            return _with_arrays(unpickler(file).load())
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{path}: {error}") from error
        except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError,
                MemoryError, OverflowError, RecursionError) as error:  # fmt: skip
            raise UnsafePickleError(f"{path}: expected a whole pickle, got a damaged one ({error})") from error


class Dtype:
    """Stands in for numpy.dtype: a numeric dtype, given by a code like "f8" and a byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", code):
            raise UnsafePickleError(f"array: expected a numeric dtype, got {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """state = (version, byte order, ...); the rest describes structured dtypes, which are refused."""
        order = state[1]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise UnsafePickleError(f"array: expected a numeric dtype, got the description {state!r}")
        self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stands in for numpy.ndarray: an array, given by shape, dtype, memory order and bytes."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """state = (version, shape, dtype, column-major, bytes)."""
        _, shape, dtype, is_fortran, data = state
        self.array = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, Dtype) or not isinstance(data, (bytes, bytearray)):
        raise UnsafePickleError(f"array: expected a numeric dtype and bytes, got {_types((dtype, data))}")
    return np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, ()).item()


def _storage(data: Any) -> torch.storage.TypedStorage:
    """Reads a tensor's storage, a pickle within the pickle, with torch's own safe reader (weights_only=True)."""
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnsafePickleError(f"tensor: expected a storage, got {type(storage).__name__}")
    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
    """Builds a tensor as a view of a storage. A view that would reach beyond the storage is refused."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnsafePickleError(f"tensor: expected a storage, got {type(storage).__name__}")
    numbers = [offset, *size, *stride]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
        raise UnsafePickleError(f"tensor: expected offset, size and stride, got {offset!r}, {size!r}, {stride!r}")
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if math.prod(size) else 0
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    if reach > flat.numel():
        raise UnsafePickleError(f"tensor: expected {reach} stored numbers, got {flat.numel()}")
    return flat.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Any, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise UnsafePickleError(f"parameter: expected a tensor, got {type(data).__name__}")
    return data


def _bytes(text: str, encoding: str) -> bytes:
    """Decodes bytes as old pickle protocols write them."""
    if encoding != "latin1":
        raise UnsafePickleError(f"bytes: expected the encoding latin1, got {encoding!r}")
    return text.encode("latin1")


def _types(values: Sequence[object]) -> str:
    return ", ".join(type(value).__name__ for value in values)


def _with_arrays(value: Any) -> Any:
    """Replaces every `Array` in nested containers by its numpy array."""
    if isinstance(value, Array):
        return value.array
    if type(value) in (list, tuple):
        return type(value)(_with_arrays(item) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _with_arrays(item)) for key, item in value.items())
    return value


NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": Array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _array,
}
ADMITTED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _bytes,
    "builtins.set": set,
    "builtins.bytearray": bytearray,
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    **{f"numpy.{core}.{name}": builder for core in ("core", "_core") for name, builder in NUMPY.items()},
    "torch.Size": tuple,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
}
