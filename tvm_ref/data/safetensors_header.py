"""Checks what a safetensors header states, the shape and place of each tensor, before memory is asked for."""

import math
import os
from pathlib import Path
from typing import Any

from .untrusted import UntrustedFileError, open_regular, parse_json, shown

MOST_HEADER = 100_000_000  # bytes, the limit of the format
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header: {name: {"dtype", "shape", "data_offsets"}}, perhaps with "__metadata__", a dict of texts.

    Raises OSError, or UntrustedFileError, naming the file, unless the tensors fill the rest of the file without gaps
    and overlaps.
    """
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MOST_HEADER, length - 8):
            raise UntrustedFileError(f"{path}: expected a safetensors header within the file, got {size} bytes of one")
        try:
            header = parse_json(file.read(size))
            _check(header, length - 8 - size)
        except (ValueError, TypeError, KeyError) as error:
            raise UntrustedFileError(f"{path}: expected a safetensors header, got a damaged one ({error})") from error
    return header


def _check(header: Any, length: int) -> None:
    if not isinstance(header, dict):
        raise ValueError(f"expected an object, got {shown(header)}")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("expected metadata of texts")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        numbers = [*entry["shape"], *entry["data_offsets"]]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise ValueError(f"expected a shape and a place of {shown(name)}")
        begin, end = entry["data_offsets"]
        if 8 * (end - begin) != math.prod(entry["shape"]) * BITS[entry["dtype"]]:
            raise ValueError(f"expected {shown(name)} with as many bytes as its shape needs, got {end - begin}")
        places.append((begin, end))
    here = 0
    for begin, end in sorted(places):
        if begin != here:
            raise ValueError(f"expected tensors one after the other, got one at {begin} in place of {here}")
        here = end
    if here != length:
        raise ValueError(f"expected {here} bytes of tensors, got {length}")
