"""Damaged archives: labels, images, latents and zip files are refused, and the error names the file."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tvm_ref.data.archives import (
    ALL,
    DEVIATIONS,
    IMAGE_NAMES,
    LATENT_NAMES,
    MEANS,
    PIXELS,
    Files,
    Store,
    as_folder,
    as_zip,
    images,
    latents,
    npy,
    png,
    stores,
)
from tvm_ref.data.archive import DatasetError, ImageArchive, LatentArchive
from tvm_ref.data.dataset import DataConfig, open_dataset


def bad_labels(labels: object, names: list[str] = IMAGE_NAMES) -> Files:
    if isinstance(labels, list):
        return {
            "dataset.json": json.dumps({"labels": [list(pair) for pair in zip(names, labels, strict=True)]}).encode()
        }
    return {"dataset.json": json.dumps(labels).encode()}


@stores
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_labels([2, 0, 3]), "img00000002.png has label 3; expected 0 <= label < num_classes = 3"),
        (bad_labels([2, -1, 1]), "img00000001.png has label -1"),
        (bad_labels([2, True, 1]), "dataset.json: expected entries"),
        (bad_labels([2, 1.0, 1]), "dataset.json: expected entries"),
        (bad_labels({"labels": None}), "dataset.json: expected"),
        (bad_labels({"labels": [["00000/img00000000.png"]]}), "dataset.json: expected entries"),
        (bad_labels("labels"), "dataset.json: expected"),
        (bad_labels([0, 1], IMAGE_NAMES[:2]), "has no label for 00000/img00000002.png"),
        (bad_labels([0, 1, 2, 0], [*IMAGE_NAMES, "00000/gone.png"]), "labels 00000/gone.png, which"),
        (bad_labels([0, 1, 2, 0], [*IMAGE_NAMES, IMAGE_NAMES[1]]), "img00000001.png twice"),
        ({"dataset.json": b'{"labels": ['}, "dataset.json: cannot be read"),
    ],
)
def test_bad_labels_are_refused_on_opening(store: Store, change: Files, message: str, tmp_path: Path) -> None:
    path = store(images() | change, tmp_path)
    with pytest.raises(DatasetError) as caught:
        ImageArchive(path, 3)
    assert message in str(caught.value) and str(path) in str(caught.value)


@stores
def test_missing_labels_are_refused(store: Store, tmp_path: Path) -> None:
    files = images()
    del files["dataset.json"]
    with pytest.raises(DatasetError, match=r"dataset\.json is missing"):
        ImageArchive(store(files, tmp_path), 3)


@stores
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(PIXELS[0][:4]), r"has shape \[4, 4, 3\], but 00000/img00000000.png has \[6, 4, 3\]"),
        (png(PIXELS[0][:, :, 0]), "expected an 8-bit RGB image, got mode L"),
        (png(np.concatenate([PIXELS[0], PIXELS[0][:, :, :1]], axis=2)), "got mode RGBA"),
        (b"", "cannot identify"),
        (npy(MEANS[0]), "cannot identify"),
    ],
)
def test_a_bad_image_is_named_when_it_is_read(store: Store, content: bytes, message: str, tmp_path: Path) -> None:
    dataset = ImageArchive(store(images() | {IMAGE_NAMES[1]: content}, tmp_path), 3)
    dataset.get(np.array([0, 2]), torch.Generator())
    with pytest.raises(DatasetError, match=message) as caught:
        dataset.get(ALL, torch.Generator())
    assert IMAGE_NAMES[1] in str(caught.value)


def test_a_data_set_opens_past_bad_items_at_its_start(tmp_path: Path) -> None:
    """But past no more than are allowed: else the first bad one is found before the first step."""
    damaged = png(PIXELS[0])[:40]
    path = as_zip(images() | {name: damaged for name in IMAGE_NAMES[:2]}, tmp_path)
    for allowed in (0, 1):
        with pytest.raises(DatasetError, match=rf"{IMAGE_NAMES[allowed]}: expected a PNG file, got a damaged one$"):
            ImageArchive(path, 3, allowed)
    opened = ImageArchive(path, 3, 2)
    assert opened.shape == (3, *PIXELS[0].shape[:2])
    assert opened.get(np.array([2]), torch.Generator())[0].shape == (1, *opened.shape)


def object_array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return content.getvalue()


def several_arrays() -> bytes:
    content = io.BytesIO()
    np.savez(content, a=MEANS[0])
    return content.getvalue()


def changed(channel: int, value: float) -> bytes:
    latent = np.concatenate([MEANS[0], DEVIATIONS[0]])
    latent[channel, 0, 0] = value
    return npy(latent)


@stores
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.concatenate([MEANS[0], DEVIATIONS[0]]).astype(np.float64)), "expected float32, got float64"),
        (npy(np.concatenate([MEANS[0], DEVIATIONS[0]]).astype(">f4")), "expected float32"),
        (npy(MEANS[0]), r"expected shape \[8, h, w\], got \[4, 5, 3\]"),
        (npy(np.zeros((8, 5), np.float32)), "expected shape"),
        (npy(np.zeros((8, 5, 4), np.float32)), r"has shape \[8, 5, 4\], but 00000/img-mean-std-00000000.npy"),
        (changed(0, np.nan), "expected finite"),
        (changed(7, np.inf), "expected finite"),
        (changed(7, -0.5), "not negative"),
        (object_array(), "allow_pickle=False"),
        (several_arrays(), "expected one array"),
        (pickle.dumps(MEANS[0]), "img-mean-std-00000001.npy"),
        (b"", "img-mean-std-00000001.npy"),
    ],
)
def test_a_bad_latent_is_named_when_it_is_read(store: Store, content: bytes, message: str, tmp_path: Path) -> None:
    dataset = LatentArchive(store(latents() | {LATENT_NAMES[1]: content}, tmp_path), 3, "imagenet256")
    dataset.get(np.array([0, 2]), torch.Generator())
    with pytest.raises(DatasetError, match=message) as caught:
        dataset.get(ALL, torch.Generator())
    assert LATENT_NAMES[1] in str(caught.value)


@stores
def test_the_first_item_is_checked_on_opening(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"img00000000\.png"):
        ImageArchive(store(images() | {IMAGE_NAMES[0]: b"?"}, tmp_path), 3)


@pytest.mark.parametrize(("files", "name"), [(images(), IMAGE_NAMES[1]), (latents(), LATENT_NAMES[1])])
def test_truncation_anywhere_is_named(files: Files, name: str, tmp_path: Path) -> None:
    path = as_folder(files, tmp_path)
    dataset = ImageArchive(path, 3) if name.endswith("png") else LatentArchive(path, 3, "imagenet256")
    for length in range(len(files[name])):
        (path / name).write_bytes(files[name][:length])
        with pytest.raises(DatasetError, match=name):
            dataset.item(1)


def test_a_changed_byte_of_an_image_is_named(tmp_path: Path) -> None:
    path = as_folder(images(), tmp_path)
    dataset = ImageArchive(path, 3)
    for offset in range(len(images()[IMAGE_NAMES[1]])):
        flipped = bytearray(images()[IMAGE_NAMES[1]])
        flipped[offset] ^= 1
        (path / IMAGE_NAMES[1]).write_bytes(flipped)
        with pytest.raises(DatasetError, match=IMAGE_NAMES[1]):
            dataset.item(1)


@pytest.mark.parametrize("files", [images(), latents()])
def test_a_changed_byte_in_a_zip_file_is_named(files: Files, tmp_path: Path) -> None:
    path = as_zip(files, tmp_path)
    name = next(name for name in files if name.endswith("00001.png") or name.endswith("00001.npy"))
    kind = ImageArchive if name.endswith("png") else lambda path, n: LatentArchive(path, n, "imagenet256")
    whole, content = path.read_bytes(), files[name]
    start = whole.index(content)
    for offset in range(0, len(content), 7):
        flipped = bytearray(whole)
        flipped[start + offset] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(DatasetError, match=name):
            kind(path, 3).item(1)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    path = as_folder(images(), tmp_path)
    dataset = ImageArchive(path, 3)
    (path / IMAGE_NAMES[2]).unlink()
    with pytest.raises(DatasetError, match=IMAGE_NAMES[2]):
        dataset.get(ALL, torch.Generator())


def test_compressed_members_are_named(tmp_path: Path) -> None:
    path = as_zip(images(), tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("00000/img00000003.png", png(PIXELS[0]))
    with pytest.raises(DatasetError, match=r"img00000003\.png is compressed"):
        ImageArchive(path, 0)


def test_a_member_without_a_name_is_ignored(tmp_path: Path) -> None:
    """zipfile cannot say whether it is a folder."""
    path = as_zip(images(), tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x", b"")
    content = path.read_bytes()
    local, central = content.rindex(b"PK\x03\x04"), content.rindex(b"PK\x01\x02")
    without = bytearray(content)
    del without[central + 46], without[local + 30]
    without[central - 1 + 28 : central - 1 + 30] = without[local + 26 : local + 28] = b"\0\0"
    end = len(without) - 22
    start = int.from_bytes(without[end + 16 : end + 20], "little") - 1
    size = int.from_bytes(without[end + 12 : end + 16], "little") - 1
    without[end + 12 : end + 20] = size.to_bytes(4, "little") + start.to_bytes(4, "little")
    path.write_bytes(without)
    with zipfile.ZipFile(path) as archive:
        assert "" in archive.namelist()
    assert len(ImageArchive(path, 3)) == 3


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_occur_twice_are_refused(tmp_path: Path) -> None:
    path = as_zip(images(), tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(IMAGE_NAMES[1], png(PIXELS[0]))
    with pytest.raises(DatasetError, match=r"img00000001\.png is in the archive twice"):
        ImageArchive(path, 0)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        open_dataset(DataConfig(name="archive", path=str(tmp_path / "none.zip")))
    with pytest.raises(DatasetError, match=r"holds no \.png file"):
        ImageArchive(tmp_path, 0)
    path = as_zip(images(), tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=r"data\.zip: not a complete zip file"):
        ImageArchive(path, 0)
