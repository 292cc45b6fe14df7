"""Reads the two formats of torch.save without torch.load: a zip file, and the older one, a row of pickles.

Both hold one pickle of the contents, which refers to the storages of tensors by keys, and their bytes beside it. All
sizes that a file states are compared with its own length before anything is read.
"""

import os
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from .stand_ins import Storage, UnsafePickleError
from .untrusted import shown

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format
ZIP_MAGIC = b"PK\x03\x04"
PROTOCOL = 1001
MOST_MEMBERS = 100_000
MOST_PICKLE = 256 * 2**20  # bytes of the pickle in a zip file, which holds no numbers of tensors

Storages = Callable[[str, torch.dtype, int], Storage]
Unpickle = Callable[[BinaryIO, Storages | None], Any]  # reads one pickle from a stream and leaves it behind its end


def read_zip(file: BinaryIO, unpickle: Unpickle) -> Any:
    """Reads a zip file of torch.save. Raises UnsafePickleError or zipfile.BadZipFile; views are left to the caller."""
    length = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()) or len(members) > MOST_MEMBERS:
            raise UnsafePickleError(f"zip: expected at most {MOST_MEMBERS} members, each once")
        sizes = [member.file_size for member in members.values()]
        if sum(sizes) > length:
            raise UnsafePickleError(f"zip: expected members of at most {length} bytes in all, got {sum(sizes)}")
        for member in members.values():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise UnsafePickleError(f"zip: expected members without compression, got {shown(member.filename)}")
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnsafePickleError("zip: expected a file of torch.save, got a zip file without data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in members:
            raise UnsafePickleError("zip: expected a file of torch.save, got a TorchScript program")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise UnsafePickleError("zip: expected the byte order little, got another")
        if members[pickles[0]].file_size > MOST_PICKLE:
            raise UnsafePickleError(f"zip: expected a data.pkl of at most {MOST_PICKLE} bytes")
        found: dict[str, Storage] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
            if key not in found:
                member = members.get(f"{folder}data/{key}")
                stored = None if member is None else member.file_size
                new = Storage(dtype, count)
                if stored != new.size:
                    raise UnsafePickleError(f"storage {shown(key)}: expected {new.size} bytes, got {stored}")
                new.fill(archive.read(f"{folder}data/{key}"))
                found[key] = new
            return _same(found[key], key, dtype, count)

        with archive.open(pickles[0]) as stream:
            return unpickle(stream, storage)  # type: ignore[arg-type]


def read_legacy(stream: BinaryIO, unpickle: Unpickle) -> Any:
    """Reads the older format from behind its first pickle, `MAGIC`. Raises UnsafePickleError."""
    found: dict[str, Storage] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        return _same(found.setdefault(key, Storage(dtype, count)), key, dtype, count)

    if unpickle(stream, None) != PROTOCOL:
        raise UnsafePickleError(f"torch.save: expected version {PROTOCOL}, got another")
    system = unpickle(stream, None)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsafePickleError("torch.save: expected the byte order little, got another")
    contents, keys = unpickle(stream, storage), unpickle(stream, None)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(found):
        raise UnsafePickleError("torch.save: expected the keys of its storages, got others")
    here = stream.tell()
    stream.seek(0, os.SEEK_END)
    left = stream.tell() - here
    stream.seek(here)
    for key in keys:
        size, left = found[key].size, left - 8 - found[key].size
        if left < 0 or int.from_bytes(stream.read(8), "little") != found[key].count:
            raise UnsafePickleError(f"storage {shown(key)}: expected {size} bytes, got another number")
        found[key].fill(stream.read(size))
    return contents


def _same(storage: Storage, key: str, dtype: torch.dtype, count: int) -> Storage:
    if (storage.dtype, storage.count) != (dtype, count):
        raise UnsafePickleError(f"storage {shown(key)}: expected one dtype and size, got two")
    return storage
