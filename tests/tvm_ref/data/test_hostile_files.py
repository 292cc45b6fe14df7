"""Files made to exhaust memory, time or the stack: each is refused in one line, at once."""

import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tvm_ref.data.archives import as_folder, images, npy
from tvm_ref.data.archive import DatasetError, ImageArchive, LatentArchive
from tvm_ref.data.npy import read_npy
from tvm_ref.data.safe_pickle import load
from tvm_ref.data.safetensors_header import read_header
from tvm_ref.data.untrusted import UntrustedFileError, open_regular, parse_json
from tvm_ref.quality.reference import ReferenceFileError, load_moments
from tvm_ref.training.config import ConfigError, load_config

MOST = 64 * 2**20  # bytes that a refusal may take


def special(path: Path, kind: str) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    readers = {
        "network.pkl": load,
        "moments.npz": load_moments,
        "config.json": load_config,
        "a.safetensors": read_header,
    }
    for name, read in readers.items():
        with pytest.raises((OSError, ValueError), match=name):
            read(special(tmp_path / name, kind))
    folder = as_folder(images(), tmp_path)
    (folder / "00000" / "img00000001.png").unlink()
    special(folder / "00000" / "img00000001.png", kind)
    with pytest.raises(DatasetError):
        ImageArchive(folder, 3).item(1)
    if kind != "folder":
        with pytest.raises((OSError, DatasetError)):
            ImageArchive(special(tmp_path / "data.zip", kind), 3)


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        header("(8, 1000000000, 1000000)") + bytes(64),
        header("(8, 100000, 10000)") + bytes(64),
        header("(8, -1, 1)") + bytes(64),
        header("(" * 3000),
        header("(8, 1, 1)") + bytes(31),
        header("(8, 1, 1)") + bytes(33),
        b"\x93NUMPY\x03\x00" + bytes(64),
        npy(np.array([{}], dtype=object)),
        b"PK\x03\x04",
        b"",
    ],
)
def test_an_array_whose_header_lies_is_refused_before_memory_is_asked_for(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected|magic|EOF"):
            read_npy(content)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def test_an_image_that_states_too_many_pixels_is_refused(tmp_path: Path) -> None:
    files = images()
    content = files["00000/img00000000.png"]
    chunk = b"IHDR" + struct.pack(">II", 2**16, 2**16) + content[24:29]
    files["00000/img00000000.png"] = content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    with pytest.raises(DatasetError, match=r"img00000000.png: expected an image of at most 67108864 pixels"):
        ImageArchive(as_folder(files, tmp_path), 3)


def test_compressed_statistics_that_grow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_ref.quality.reference.MOST_STATISTICS", 1000)
    np.savez_compressed(tmp_path / "m.npz", mu=np.zeros(10**6), sigma=np.eye(2))
    with pytest.raises(ReferenceFileError, match="at most 1000 bytes"):
        load_moments(tmp_path / "m.npz")


@pytest.mark.parametrize("content", [b"[" * 10**6, b"9" * 10_000, b"\xff\xfe", b'{"a":' * 10**5, b""])
def test_json_that_is_nested_or_damaged_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UntrustedFileError, match="expected JSON"):
        parse_json(content)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json is no training configuration"):
        load_config(tmp_path / "config.json")
    files = images() | {"dataset.json": content}
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        ImageArchive(as_folder(files, tmp_path), 3)


def test_a_file_beyond_its_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_ref.data.archive.MOST_ITEM", 100)
    with pytest.raises(DatasetError, match="at most 100 bytes"):
        ImageArchive(as_folder(images(), tmp_path), 3)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(ConfigError, match="at most"):
        load_config(tmp_path / "config.json")
    with pytest.raises(DatasetError):
        LatentArchive(tmp_path / "config.json", 0, "imagenet256")


def safetensors(entries: dict[str, Any], data: bytes, size: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors({}, b"", 2**60),
        safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(3)),
        safetensors({x: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for x in "ab"}, bytes(4)),
        safetensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, bytes(8)),
        safetensors({"a": 3}, b""),
        safetensors({"a": {"dtype": "X", "shape": [], "data_offsets": [0, 0]}}, b""),
        b"short",
    ],
)
def test_a_header_of_safetensors_that_lies_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UntrustedFileError, match=r"a\.safetensors: expected a safetensors header"):
        read_header(tmp_path / "a.safetensors")


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"
