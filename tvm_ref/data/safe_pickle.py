"""Reads an untrusted pickle of tensors, arrays and plain containers without executing anything in it.

A pickle is a program: it names functions, which the standard unpickler imports and calls. `SafeUnpickler` has a fixed
table of allowed names instead. Each is bound to a function of this file that checks its arguments and builds a tensor,
an array or a plain container. Every other name is refused, and nothing is imported.

Sizes are checked before memory is asked for: `pickle_limits` reads the operations first, and tensors are stand-ins
until all of the file is read. Files of torch.save are read the same way, see `torch_file`.
"""

import io
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .pickle_limits import check_pickle
from .stand_ins import STORAGES, Builder, StandIn, Storage, StorageType, UnsafePickleError, View
from .torch_file import MAGIC, ZIP_MAGIC, Storages, read_legacy, read_zip
from .untrusted import one_line, open_regular, shown

__all__ = ["SafeUnpickler", "UnsafePickleError", "load"]

PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # module names that pickle protocols 0 to 2 write
DTYPES = ("bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8")
# What the standard unpickler, zipfile and the functions below raise for damaged bytes.
DAMAGE = (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError,
          MemoryError, OverflowError, RecursionError, zipfile.BadZipFile, zlib.error, NotImplementedError,
          struct.error)  # fmt: skip


class SafeUnpickler(pickle.Unpickler):
    """Allows tensors (on the CPU), torch dtypes, numeric numpy arrays and plain containers; refuses the rest by name.

    Tensors and numpy arrays are stand-ins until `load` replaces them.
    """

    def __init__(self, stream: BinaryIO, storages: Storages | None = None) -> None:
        """storages: gives the storage of a key; without it, references to data outside the pickle are refused."""
        super().__init__(stream)
        self._storages = storages

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
        """Returns the storage that `pid` names, in a file of torch.save. Raises UnsafePickleError for all else."""
        match pid:
            case ("storage", StorageType() as kind, str(key), str(), int(count), *view) if (
                self._storages and count >= 0 and view in ([], [None])
            ):
                return self._storages(key, kind.dtype, count)
        raise UnsafePickleError(f"pickle: expected a file complete in itself, got the outside reference {shown(pid)}")


def load(path: Path, unpickler: type[SafeUnpickler] = SafeUnpickler) -> Any:
    """Reads a pickle, or a file of torch.save. Raises UnsafePickleError, naming the file, if it is refused or damaged.

    Raises OSError, or UntrustedFileError (a ValueError) for anything but a regular file.
    """

    def unpickle(stream: BinaryIO, storages: Storages | None) -> Any:
        return _one(stream, unpickler, storages)

    with open_regular(path) as file:
        try:
            if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
                return _finished(read_zip(file, unpickle), {})
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _finished(_contents(content, unpickle), {})  # type: ignore[arg-type]
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{path}: {one_line(error)}") from error
        except DAMAGE as error:
            raise UnsafePickleError(
                f"{path}: expected a whole pickle, got a damaged one ({one_line(error)})"
            ) from error


def _contents(stream: BinaryIO, unpickle: Callable[[BinaryIO, Storages | None], Any]) -> Any:
    """Reads a plain pickle, or the older format of torch.save, which begins with a magic number."""
    first = unpickle(stream, None)
    return read_legacy(stream, unpickle) if type(first) is int and first == MAGIC else first


def _one(stream: BinaryIO, unpickler: type[SafeUnpickler], storages: Storages | None) -> Any:
    """Checks and reads one pickle, and leaves the stream behind it."""
    start = stream.tell()
    check_pickle(stream)
    end = stream.tell()
    stream.seek(start)
    value = unpickler(stream, storages).load()
    stream.seek(end)
    return value


def _finished(value: Any, seen: dict[int, tuple[Any, Any]]) -> Any:
    """Replaces every stand-in for a tensor or an array, in nested containers and records. Visits each object once."""
    if id(value) in seen:
        return seen[id(value)][1]
    result = value
    seen[id(value)] = value, result  # keeps `value` alive, so that its id stays its own
    if isinstance(value, Array):
        result = value.array
    elif isinstance(value, View):
        result = value.tensor()
    elif isinstance(value, StandIn):
        raise UnsafePickleError(f"pickle: expected tensors, got a {type(value).__name__} without one")
    elif type(value) is list:
        value[:] = [_finished(item, seen) for item in value]
    elif type(value) is tuple:
        result = tuple(_finished(item, seen) for item in value)
    elif type(value) in (dict, OrderedDict):
        for key in value:
            value[key] = _finished(value[key], seen)
    elif isinstance(value, Record):
        for name in ("arguments", "items", "state"):
            setattr(value, name, _finished(getattr(value, name), seen))
    seen[id(value)] = value, result
    return result


class Record:
    """An inert stand-in for an object of any class: the name of the class, arguments, state and items."""

    name = ""
    arguments: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> "Record":
        """Creates a record without state or items. This is not `__init__`, which unpicklers may skip."""
        record = super().__new__(cls)
        record.arguments, record.items, record.state = arguments, {}, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, item: Any) -> None:
        """Adds an item, if the object was like a list."""
        self.items[len(self.items)] = item


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


class _StorageUnpickler(SafeUnpickler):
    """Allows the types of storages alone."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if not isinstance(found, StorageType):
            raise UnsafePickleError(f"storage: expected numbers only, got a reference to {module}.{name}")
        return found


def _storage(data: Any) -> Storage:
    """Reads a tensor's storage, a file of torch.save within the pickle."""
    if not isinstance(data, bytes):
        raise UnsafePickleError(f"tensor: expected bytes, got {type(data).__name__}")
    found = _contents(io.BytesIO(data), lambda stream, storages: _one(stream, _StorageUnpickler, storages))
    if not isinstance(found, Storage):
        raise UnsafePickleError(f"tensor: expected a storage, got {type(found).__name__}")
    return found


def _parameter(data: Any, *_: object) -> View:
    if not isinstance(data, View):
        raise UnsafePickleError(f"parameter: expected a tensor, got {type(data).__name__}")
    return data


def _bytes(text: Any, encoding: Any) -> bytes:
    """Decodes bytes as old pickle protocols write them."""
    if encoding != "latin1" or not isinstance(text, str):
        raise UnsafePickleError(f"bytes: expected text and the encoding latin1, got {shown(encoding)}")
    return text.encode("latin1")


def _bytearray(data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    """Never takes a number, which would be the size of an array of zeros."""
    if isinstance(data, str) and encoding == "latin-1":
        data = data.encode("latin1")
    if not isinstance(data, bytes):
        raise UnsafePickleError(f"bytearray: expected bytes, got {type(data).__name__}")
    return bytearray(data)


def _plain(kind: type) -> Builder:
    """Builds a container from at most one list or tuple."""

    def build(items: Any = ()) -> Any:
        if type(items) not in (list, tuple):
            raise UnsafePickleError(f"{kind.__name__}: expected a list or a tuple, got {type(items).__name__}")
        return kind(items)

    return Builder(build)


def _types(values: Sequence[object]) -> str:
    return ", ".join(type(value).__name__ for value in values)


NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": Array,
    "multiarray.scalar": Builder(_scalar),
    "numeric._frombuffer": Builder(_array),
}
ADMITTED: dict[str, Callable[..., Any] | StorageType] = {
    "_codecs.encode": Builder(_bytes),
    "builtins.set": _plain(set),
    "builtins.bytearray": Builder(_bytearray),
    "collections.OrderedDict": _plain(OrderedDict),
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    **{f"numpy.{core}.{name}": builder for core in ("core", "_core") for name, builder in NUMPY.items()},
    "torch.Size": _plain(tuple),
    "torch._utils._rebuild_parameter": Builder(_parameter),
    "torch._utils._rebuild_tensor_v2": Builder(View),
    "torch.storage._load_from_bytes": Builder(_storage),
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in STORAGES.items()},
}
