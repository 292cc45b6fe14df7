"""The reader of Fashion-MNIST: good files, missing ones, and ones that are damaged or hostile."""

import gzip
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tvm_ref.data.archive import DatasetError
from tvm_ref.data.dataset import DataConfig, open_dataset
from tvm_ref.data.fashion import CLASSES, PARTS, PIXELS, real_fashion

MOST = 200 * 2**20  # bytes that a refusal may take; the images themselves have 47 MB
LABELS, IMAGES = "train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"


def idx(numbers: np.ndarray) -> bytes:
    """An idx file of bytes."""
    return struct.pack(f">BBBB{numbers.ndim}I", 0, 0, 8, numbers.ndim, *numbers.shape) + numbers.tobytes()


def packed(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=1)


def some_images(count: int) -> np.ndarray:
    """Images that differ, and compress well."""
    images = np.zeros((count, PIXELS, PIXELS), dtype=np.uint8)
    images[:, 3, 4] = np.arange(count) % 256
    return images


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The four files, of made-up images."""
    files = {}
    for part, count in PARTS.items():
        files[f"{part}-images-idx3-ubyte.gz"] = packed(idx(some_images(count)))
        files[f"{part}-labels-idx1-ubyte.gz"] = packed(idx((np.arange(count) % CLASSES).astype(np.uint8)))
    return files


@pytest.fixture
def folder(tmp_path: Path, good: dict[str, bytes]) -> Path:
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_images_and_labels_are_those_of_the_files(folder: Path) -> None:
    dataset = open_dataset(DataConfig(name="fashion", path=str(folder)))
    assert (len(dataset), dataset.shape, dataset.num_classes) == (60_000, (1, 28, 28), 10)
    x, labels = dataset.get(np.array([255, 0, 77]), torch.Generator())
    assert x.dtype == torch.float32 and x.shape == (3, 1, 28, 28) and labels.tolist() == [5, 0, 7]
    expected = torch.tensor([255, 0, 77]) / 127.5 - 1
    assert torch.equal(x[:, 0, 3, 4], expected) and bool((x[:, 0, 0] == -1).all())
    assert len(real_fashion(folder, held_out=True).labels) == 10_000


def test_a_missing_file_is_said_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images.*dataset-fashion-mnist.*github.com/zalandoresearch"):
        open_dataset(DataConfig(name="fashion", path=str(tmp_path)))


BAD: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut short": (LABELS, lambda content: content[: len(content) // 2]),
    "not gzip": (LABELS, lambda content: gzip.decompress(content)),
    "empty": (LABELS, lambda content: b""),
    "damaged": (LABELS, lambda content: content[:20] + bytes([content[20] ^ 255]) + content[21:]),
    "another header": (LABELS, lambda content: packed(b"\0\0\x08\x02" + gzip.decompress(content)[4:])),
    "fewer bytes": (LABELS, lambda content: packed(gzip.decompress(content)[:-1])),
    "more bytes": (LABELS, lambda content: packed(gzip.decompress(content) + b"\0")),
    "label 10": (LABELS, lambda content: packed(gzip.decompress(content)[:-1] + b"\n")),
    "labels as images": (IMAGES, lambda content: packed(idx(np.zeros(60_000, dtype=np.uint8)))),
    "floats": (IMAGES, lambda content: packed(b"\0\0\x0d\x03" + gzip.decompress(content)[4:])),
    "bomb": (LABELS, lambda content: packed(gzip.decompress(content) + bytes(2**28))),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_and_takes_no_memory(folder: Path, good: dict[str, bytes], kind: str) -> None:
    name, spoil = BAD[kind]
    (folder / name).write_bytes(spoil(good[name]))
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=name):
            real_fashion(folder, held_out=False)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device"])
def test_only_regular_files_are_opened(folder: Path, kind: str) -> None:
    path = folder / IMAGES
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    with pytest.raises(DatasetError, match=IMAGES):
        real_fashion(folder, held_out=False)


def test_a_path_belongs_to_data_that_are_files() -> None:
    with pytest.raises(ValueError, match="path belongs to data 'archive' and 'fashion'"):
        DataConfig(name="digits", path="here")
