"""Archives of images and latents: what is read, and what is refused with the name of the file."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from tvm_ref.data.archive import DatasetError, ImageArchive, LatentArchive
from tvm_ref.data.dataset import DataConfig, open_dataset
from tvm_ref.data.latents import LATENT_STATISTICS, denormalise, normalise
from verify.budget.metric_tolerance import normalisation_bound

Files = dict[str, bytes]
LABELS = [2, 0, 1]


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def npy(value: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, value)
    return content.getvalue()


def labels_file(names: list[str], labels: list[int]) -> bytes:
    return json.dumps({"labels": list(zip(names, labels, strict=True))}).encode()


PIXELS = [np.random.default_rng(i).integers(0, 256, (6, 4, 3), dtype=np.uint8) for i in range(3)]
IMAGE_NAMES = [f"00000/img{i:08d}.png" for i in range(3)]
MEANS = [np.random.default_rng(i).standard_normal((4, 5, 3)).astype(np.float32) for i in range(3)]
DEVIATIONS = [np.random.default_rng(10 + i).random((4, 5, 3)).astype(np.float32) for i in range(3)]
LATENT_NAMES = [f"00000/img-mean-std-{i:08d}.npy" for i in range(3)]


def images() -> Files:
    return {
        "dataset.json": labels_file(IMAGE_NAMES[::-1], LABELS[::-1]),  # the order in the file means nothing
        **{name: png(pixels) for name, pixels in zip(IMAGE_NAMES, PIXELS, strict=True)},
    }


def latents(deviations: list[np.ndarray] = DEVIATIONS) -> Files:
    items = zip(LATENT_NAMES, MEANS, deviations, strict=True)
    return {
        "dataset.json": labels_file(LATENT_NAMES, LABELS),
        **{name: npy(np.concatenate([mean, deviation])) for name, mean, deviation in items},
    }


def as_folder(files: Files, where: Path) -> Path:
    for name, content in files.items():
        (where / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (where / "data" / name).write_bytes(content)
    return where / "data"


def as_zip(files: Files, where: Path) -> Path:
    with zipfile.ZipFile(where / "data.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return where / "data.zip"


Store = Callable[[Files, Path], Path]
stores = pytest.mark.parametrize("store", [as_folder, as_zip])
ALL = np.arange(3)


@stores
def test_images_are_read_in_the_order_of_their_names(store: Store, tmp_path: Path) -> None:
    path = store(images(), tmp_path)
    dataset = open_dataset(DataConfig(name="archive", path=str(path), num_classes=3))
    x, labels = dataset.get(np.array([2, 0]), torch.Generator())
    assert len(dataset) == 3 and dataset.num_classes == 3 and dataset.shape == x.shape[1:] == (3, 6, 4)
    assert x.dtype == torch.float32 and labels.dtype == torch.int64 and labels.tolist() == [LABELS[2], LABELS[0]]
    expected = np.stack([PIXELS[2], PIXELS[0]]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    assert np.array_equal(x.numpy(), expected)
    stored = ImageArchive(path, 3).pixels(ALL)
    assert stored.dtype == torch.uint8 and np.array_equal(stored.permute(0, 2, 3, 1).numpy(), np.stack(PIXELS))


@stores
def test_without_classes_no_labels_are_read(store: Store, tmp_path: Path) -> None:
    files = images() | {"dataset.json": b"not json"}
    dataset = open_dataset(DataConfig(name="archive", path=str(store(files, tmp_path))))
    assert dataset.get(ALL, torch.Generator())[1].tolist() == [0, 0, 0]


@stores
@pytest.mark.parametrize("name", list(LATENT_STATISTICS))
def test_latents_without_deviation_are_their_normalised_mean(store: Store, name: str, tmp_path: Path) -> None:
    path = store(latents([np.zeros_like(mean) for mean in MEANS]), tmp_path)
    dataset = open_dataset(DataConfig(name="archive", path=str(path), latents=name, num_classes=3))
    x, labels = dataset.get(ALL, torch.Generator())
    assert dataset.shape == x.shape[1:] == (4, 5, 3) and x.dtype == torch.float32 and labels.tolist() == LABELS
    statistics = LATENT_STATISTICS[name]
    m, sigma = (np.array(values)[:, None, None] for values in (statistics.mean, statistics.deviation))
    exact = (np.stack(MEANS).astype(np.float64) - m) / sigma
    bound = normalisation_bound(np.stack(MEANS), m, sigma)
    assert (np.abs(x.numpy() - exact) <= bound).all()


def test_the_published_constants() -> None:
    assert LATENT_STATISTICS["imagenet256"].mean == (0.86488, -0.27787343, 0.21616915, 0.3738409)
    assert LATENT_STATISTICS["imagenet256"].deviation == (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    assert LATENT_STATISTICS["imagenet512"].mean == (1.56, -0.695, 0.483, 0.729)
    assert LATENT_STATISTICS["imagenet512"].deviation == (5.27, 5.91, 4.21, 4.31)


@pytest.mark.parametrize("name", list(LATENT_STATISTICS))
def test_denormalising_inverts_normalising(name: str) -> None:
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64) * 5
    back = denormalise(normalise(z, name), name)
    statistics = LATENT_STATISTICS[name]
    m, sigma = (np.array(values)[:, None, None] for values in (statistics.mean, statistics.deviation))
    bound = 2 * sigma * normalisation_bound(z.numpy(), m, sigma)  # the way back loses no more than the way there
    assert (np.abs((back - z).numpy()) <= bound).all()
    with pytest.raises(ValueError, match=r"\[n, 4, h, w\]"):
        normalise(z[:, :3], name)


@stores
def test_latents_are_redrawn_from_the_generator_alone(store: Store, tmp_path: Path) -> None:
    dataset = LatentArchive(store(latents(), tmp_path), 3, "imagenet256")
    draw = torch.Generator().manual_seed(1)
    x, _ = dataset.get(ALL, draw)
    again, _ = dataset.get(ALL, draw)
    assert not torch.equal(x, again)
    same, _ = dataset.get(ALL, torch.Generator().manual_seed(1))
    assert torch.equal(x, same)
    # Ranks whose generators agree draw the same noise for an item, wherever it is in whose batch.
    part, _ = dataset.get(np.array([2]), torch.Generator().manual_seed(1))
    assert torch.equal(part[0], x[2])


def test_latents_follow_the_posterior(tmp_path: Path) -> None:
    mean, deviation = np.full((4, 40, 40), 3.0, np.float32), np.full((4, 40, 40), 0.5, np.float32)
    path = as_folder({"a.npy": npy(np.concatenate([mean, deviation]))}, tmp_path)
    x, _ = LatentArchive(path, 0, "imagenet512").get(np.array([0, 0]), torch.Generator().manual_seed(5))
    assert torch.equal(x[0], x[1])  # one item is one sample, however often the batch holds it
    noise = (denormalise(x[:1].double(), "imagenet512") - 3.0) / 0.5
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-6


Fault = tuple[Files, str]


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
