"""Fashion-MNIST: 70 000 grey images of 28 x 28 pixels in ten classes, read from the four original files in a folder.

The files may be damaged or hostile: each must be regular, of limited size before and after decompression, and hold as
many bytes as its header states.
"""

import gzip
import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .archive import DatasetError
from .untrusted import UntrustedFileError, read_regular

PIXELS, CLASSES = 28, 10
PARTS = {"train": 60_000, "t10k": 10_000}
MOST_PACKED = 64 * 2**20  # bytes of a file; the largest has 26 MB
BYTES = 8  # in the idx format, the type of numbers that are bytes
WHERE = (
    "expected the folder with the four files of Fashion-MNIST, train-images-idx3-ubyte.gz and so on: Debian's package "
    "dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist, and they are at "
    "https://github.com/zalandoresearch/fashion-mnist"
)


class RealFashion(NamedTuple):
    """Images uint8 [n, 28, 28] and labels int64 [n]: 60 000 to train on, or the 10 000 of the test set."""

    images: np.ndarray
    labels: np.ndarray


def real_fashion(folder: Path, *, held_out: bool) -> RealFashion:
    """Reads the training images, or the test set, which no network is trained on.

    Raises FileNotFoundError that says where the files are to be had, and DatasetError that names a bad file.
    """
    part = "t10k" if held_out else "train"
    count = PARTS[part]
    images = _read(folder / f"{part}-images-idx3-ubyte.gz", (count, PIXELS, PIXELS))
    labels = _read(folder / f"{part}-labels-idx1-ubyte.gz", (count,))
    if labels.max() >= CLASSES:
        raise DatasetError(f"{folder / part}-labels-idx1-ubyte.gz: expected labels 0 to 9, got {labels.max()}")
    return RealFashion(images, labels.astype(np.int64))


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a gzipped idx file of this shape."""
    wanted = 4 * (1 + len(shape)) + int(np.prod(shape))
    try:
        packed = read_regular(path, MOST_PACKED)
        with gzip.open(io.BytesIO(packed)) as file:
            content = file.read(wanted + 1)  # no more than that, whatever it would unpack to
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: {WHERE}") from error
    except UntrustedFileError as error:
        raise DatasetError(str(error)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: expected a gzip file, got {error}") from error
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, BYTES, len(shape), *shape)
    if not content.startswith(header):
        raise DatasetError(f"{path}: expected an idx file of bytes, shape {list(shape)}, got another header")
    if len(content) != wanted:
        more = "more" if len(content) > wanted else str(len(content))
        raise DatasetError(f"{path}: expected {wanted} bytes, as its header states, got {more}")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


class Fashion:
    """The training set: 60 000 images, scaled to [-1, 1]. Shape (1, 28, 28), ten classes."""

    shape = (1, PIXELS, PIXELS)
    num_classes = CLASSES

    def __init__(self, folder: Path) -> None:
        """Raises as `real_fashion`."""
        real = real_fashion(folder, held_out=False)
        self._images, self._labels = torch.from_numpy(real.images.copy()), torch.from_numpy(real.labels)

    def __len__(self) -> int:
        return len(self._labels)

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns images float32 [n, 1, 28, 28] and labels int64 [n]."""
        chosen = torch.from_numpy(indices)
        return self._images[chosen, None].float() / 127.5 - 1, self._labels[chosen]
