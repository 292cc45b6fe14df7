"""Small archives of images and of latents for tests, as a folder and as a zip file."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
