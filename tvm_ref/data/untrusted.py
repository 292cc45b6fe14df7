"""Opens files that may be hostile: only regular files, of a limited size, and JSON of a limited size and depth."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_JSON = 128 * 2**20  # bytes; the labels of ImageNet take 60 MB
MOST_SETTINGS = 2**20  # bytes of the JSON of settings, a fingerprint or a manifest
MOST_SHOWN = 80  # characters of a foreign value in a message
MOST_ITEMS = 4
MOST_MESSAGE = 1000  # characters


class UntrustedFileError(ValueError):
    """A file is not a regular one, is larger than its limit, or is no JSON."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read. Raises OSError, or UntrustedFileError for a FIFO, a device, a socket or a folder.

    It never waits: a FIFO without a writer is refused like any other.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UntrustedFileError(f"{path}: expected a regular file")
    return open(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes. Raises as `open_regular`, and for a larger file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UntrustedFileError(f"{path}: expected at most {most} bytes, got {size}")
        return file.read(most)


def parse_json(content: bytes) -> Any:
    """Parses JSON. Raises UntrustedFileError for what is none, and for lists and objects nested too deeply."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UntrustedFileError(f"expected JSON, got {error}") from error


def read_settings(path: Path) -> Any:
    """Reads a JSON file of at most `MOST_SETTINGS` bytes. Raises OSError or UntrustedFileError."""
    return parse_json(read_regular(path, MOST_SETTINGS))


def shown(value: object) -> str:
    """Describes a foreign value in a few printable characters: text, a number, a short list, or its type."""
    if isinstance(value, str):
        return repr(value[:MOST_SHOWN])
    if isinstance(value, list) and len(value) <= MOST_ITEMS:
        return f"[{', '.join('[...]' if isinstance(item, list) else shown(item) for item in value)}]"
    is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return "null" if value is None else repr(value) if is_number else f"an object of type {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """The message of an error as one printable line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:MOST_MESSAGE])
