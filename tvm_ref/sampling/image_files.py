"""Writes samples as a data set of images, a folder or a zip file, in the format that data/archive.py reads."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.archive_writer import write_archive


def write_images(path: Path, images: Tensor, labels: Tensor | None) -> None:
    """Writes images uint8 [n, 3, h, w] and their labels int64 [n], if any, as a zip file (.zip) or else a folder.

    It appears under its name once it is complete. Raises FileExistsError if there is something but an empty folder, or
    OSError.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    names = [image_name(i) for i in range(len(images))]
    entries = None if labels is None else list(zip(names, labels.tolist(), strict=True))
    try:
        contents = zip(names, map(png, images), strict=True)
        write_archive(partial, contents, entries, zipped=path.suffix == ".zip")
        partial.rename(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def image_name(index: int) -> str:
    """The name of an image in a data set: "00012/img00012345.png"."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def png(image: Tensor) -> bytes:
    """The PNG file of an image uint8 [3, h, w]."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())).save(content, format="PNG")
    return content.getvalue()
