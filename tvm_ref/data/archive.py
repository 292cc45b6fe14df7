"""Data sets stored as an uncompressed zip file or a folder, of images or of VAE latents, with labels in dataset.json.

This is the format of EDM2. RGB images are named `00000/img00000000.png`. Latents are named
`00000/img-mean-std-00000000.npy` and hold float32 [8, h, w]: the mean, then the standard deviation of the VAE's
posterior, without the factor 0.18215. dataset.json holds {"labels": [[file name, class index], ...]}. Items are
numbered in the order of their names.
"""

import io
import os
import struct
import zipfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .latents import CHANNELS, LatentStatisticsName, normalise
from .noise import indexed_normals
from .npy import read_npy
from .untrusted import MOST_JSON, UntrustedFileError, open_regular, parse_json, read_regular, shown

MOST_ITEM = 256 * 2**20  # bytes of the file of an item
MOST_PIXELS = 2**26  # of an image
LABEL_FILE = "dataset.json"
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


class DatasetError(ValueError):
    """A data set, or a file in it, violates the format. The message names the file."""


class _Files(Protocol):
    names: list[str]

    def size(self, name: str) -> int: ...

    def read(self, name: str, most: int) -> bytes: ...


class _FolderFiles:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.names = sorted(
            (Path(folder) / name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names
        )

    def size(self, name: str) -> int:
        return (self._path / name).stat().st_size

    def read(self, name: str, most: int) -> bytes:
        return read_regular(self._path / name, most)


class _ZipFiles:
    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(open_regular(path))
        except UntrustedFileError as error:
            raise DatasetError(str(error)) from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise DatasetError(f"{path}: not a complete zip file ({error})") from error
        members = [member for member in self._zip.infolist() if not member.filename.endswith("/")]
        self.names = sorted(member.filename for member in members)
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise DatasetError(
                    f"{path}: {member.filename} is compressed; expected a zip file made without (zip -0)"
                )
        for name, following in pairwise(self.names):
            if name == following:
                raise DatasetError(f"{path}: {name} is in the archive twice")

    def size(self, name: str) -> int:
        return self._zip.getinfo(name).file_size

    def read(self, name: str, most: int) -> bytes:
        if (size := self.size(name)) > most:
            raise UntrustedFileError(f"expected at most {most} bytes, got {size}")
        return self._zip.read(name)


class _Archive:
    """The common part of `ImageArchive` and `LatentArchive`: files, labels, and items that are checked on reading."""

    suffix: str

    def __init__(self, path: Path, num_classes: int, max_bad: int = 0) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no dataset at {path}: expected a zip file or a folder")
        self._path = path
        self._files: _Files = _FolderFiles(path) if path.is_dir() else _ZipFiles(path)
        self._names = [name for name in self._files.names if name.endswith(self.suffix)]
        if not self._names:
            raise DatasetError(f"{path}: holds no {self.suffix} file")
        self.num_classes = num_classes
        self._labels = self._read_labels() if num_classes else np.zeros(len(self._names), dtype=np.int64)
        self._item_shape: tuple[int, ...] = ()  # of any shape, until that of the first is known
        self._item_shape, self._like = self._first(max_bad)

    def __len__(self) -> int:
        return len(self._names)

    def _first(self, max_bad: int) -> tuple[tuple[int, ...], str]:
        """The shape and name of the first good item, past at most `max_bad` bad ones."""
        for index in range(len(self)):
            try:
                return self.item(index).shape, self._names[index]
            except DatasetError:
                if index in (max_bad, len(self) - 1):
                    raise
        raise AssertionError("there is an item")

    def listing(self) -> tuple[list[str], list[int], list[int]]:
        """Returns the names of the items, their sizes in bytes, and their labels."""
        return self._names, [self._files.size(name) for name in self._names], self._labels.tolist()

    def item(self, index: int) -> np.ndarray:
        """Returns item `index` as stored. Raises DatasetError naming a file that is missing, damaged or misshapen."""
        name = self._names[index]
        try:
            value = self._decode(self._files.read(name, MOST_ITEM))
        except UnidentifiedImageError as error:
            raise DatasetError(f"{self._path}: {name}: expected a PNG file, got a damaged one") from error
        except Exception as error:  # damaged bytes make zipfile, NumPy and Pillow raise errors of many types
            raise DatasetError(f"{self._path}: {name}: {error or type(error).__name__}") from error
        if self._item_shape and value.shape != self._item_shape:
            raise DatasetError(
                f"{self._path}: {name} has shape {list(value.shape)}, but {self._like} has {list(self._item_shape)}"
            )
        return value

    def _decode(self, content: bytes) -> np.ndarray:
        raise NotImplementedError

    def _read_labels(self) -> np.ndarray:
        where = f"{self._path}: {LABEL_FILE}"
        if LABEL_FILE not in self._files.names:
            raise DatasetError(f"{where} is missing, and num_classes = {self.num_classes} needs labels")
        try:
            content = parse_json(self._files.read(LABEL_FILE, MOST_JSON))
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DatasetError(f"{where}: cannot be read ({error})") from error
        entries = content.get("labels") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DatasetError(f'{where}: expected {{"labels": [[file name, class index], ...]}}')
        labels = checked_labels(entries, self.num_classes, where)
        if missing := labels.keys() - set(self._names):
            raise DatasetError(f"{where}: labels {min(missing)}, which the dataset does not hold")
        if unlabelled := set(self._names) - labels.keys():
            raise DatasetError(f"{where}: has no label for {min(unlabelled)}")
        return np.array([labels[name] for name in self._names], dtype=np.int64)


def checked_labels(entries: Iterable[object], num_classes: int, where: str) -> dict[str, int]:
    """Checks the entries of dataset.json and returns {file name: class index}.

    Raises DatasetError, whose message starts with `where`, for a bad entry.
    """
    labels: dict[str, int] = {}
    for entry in entries:
        match entry:
            case [str(name), int(label)] if not isinstance(label, bool):
                pass
            case _:
                raise DatasetError(f"{where}: expected entries [file name, class index], got {shown(entry)}")
        if not 0 <= label < num_classes:
            raise DatasetError(
                f"{where}: {name} has label {shown(label)}; expected 0 <= label < num_classes = {num_classes}"
            )
        if name in labels:
            raise DatasetError(f"{where}: labels {name} twice")
        labels[name] = label
    return labels


class ImageArchive(_Archive):
    """RGB images in PNG files: shape (3, H, W), pixel values v / 127.5 - 1 in [-1, 1].

    num_classes, max_bad: as in DataConfig. Raises DatasetError and FileNotFoundError, on opening and when an item is
    read.
    """

    suffix = ".png"

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self._item_shape
        return channels, height, width

    def _decode(self, content: bytes) -> np.ndarray:
        if content[:8] != PNG_START or len(content) < 24:
            raise ValueError("cannot identify image file: expected a PNG file")
        width, height = struct.unpack(">II", content[16:24])
        if width * height > MOST_PIXELS:
            raise ValueError(f"expected an image of at most {MOST_PIXELS} pixels, got {width} x {height}")
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # checks the checksums of all chunks but the last
        if not content.endswith(PNG_END):
            raise ValueError("expected a PNG file that ends with its IEND chunk")
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.mode != "RGB":
                raise ValueError(f"expected an 8-bit RGB image, got mode {image.mode}")
            return np.asarray(image)

    def pixels(self, indices: np.ndarray) -> Tensor:
        """Returns images as stored, uint8 [n, 3, H, W]."""
        return torch.from_numpy(np.stack([self.item(int(index)) for index in indices])).permute(0, 3, 1, 2)

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns images float32 [n, 3, H, W] and labels int64 [n]."""
        images = self.pixels(indices).to(torch.float32) / 127.5 - 1
        return images.contiguous(), torch.from_numpy(self._labels[indices])


class LatentArchive(_Archive):
    """Latents in NumPy files: shape (4, h, w). Each access samples the posterior and normalises by `statistics`.

    num_classes, max_bad: as in DataConfig. Raises DatasetError and FileNotFoundError, on opening and when an item is
    read.
    """

    suffix = ".npy"

    def __init__(self, path: Path, num_classes: int, statistics: LatentStatisticsName, max_bad: int = 0) -> None:
        super().__init__(path, num_classes, max_bad)
        self._statistics = statistics

    @property
    def shape(self) -> tuple[int, int, int]:
        _, height, width = self._item_shape
        return CHANNELS, height, width

    def _decode(self, content: bytes) -> np.ndarray:
        value = read_npy(content)
        if value.dtype != np.float32:
            raise ValueError(f"expected float32, got {value.dtype}")
        if value.ndim != 3 or value.shape[0] != 2 * CHANNELS:
            raise ValueError(f"expected shape [{2 * CHANNELS}, h, w], got {list(value.shape)}")
        if not np.isfinite(value).all() or (value[CHANNELS:] < 0).any():
            raise ValueError("expected finite means and standard deviations that are not negative")
        return value

    def get(self, indices: np.ndarray, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns (mean + std * noise - m) / sigma, float32 [n, 4, h, w], and labels int64 [n].

        m, sigma: the statistics. `draw` gives one number, the key of the noise.
        """
        key = int(torch.randint(2**63 - 1, (), generator=draw))
        posterior = torch.from_numpy(np.stack([self.item(int(index)) for index in indices]))
        mean, deviation = posterior.chunk(2, dim=1)
        noise = indexed_normals(key, indices.tolist(), tuple(mean.shape[1:]))
        return normalise(mean + deviation * noise, self._statistics), torch.from_numpy(self._labels[indices])
