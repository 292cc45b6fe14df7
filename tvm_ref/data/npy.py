"""Reads a NumPy file whose header may lie: the shape it states must be that of the bytes that follow."""

import io
import math

import numpy as np

MAGIC = b"\x93NUMPY"


def read_npy(content: bytes) -> np.ndarray:
    """Returns the array in an .npy file. Raises ValueError, before it allocates, for a header that does not fit."""
    if content[: len(MAGIC)] != MAGIC:
        kind = "an archive of arrays" if content[:2] == b"PK" else "another file"
        raise ValueError(f"expected one array, got {kind}")
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"expected version 1.0 or 2.0 of the format, got {version}")
    try:
        shape, _, dtype = readers[version](stream)  # of at most 10 000 characters
    except Exception as error:  # the header is a literal of Python, whose parser raises errors of many types
        raise ValueError(f"expected a header of dtype and shape, got another ({type(error).__name__})") from error
    if dtype.hasobject or any(size < 0 for size in shape):
        raise ValueError(f"expected an array of numbers (allow_pickle=False), got {dtype} {list(shape)}")
    wanted, left = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if wanted != left:
        raise ValueError(f"expected {wanted} bytes of numbers, as the header states, got {left}")
    return np.load(io.BytesIO(content), allow_pickle=False)
