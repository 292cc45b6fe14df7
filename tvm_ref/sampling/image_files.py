"""Writes samples as a data set of images, a folder or a zip file, in the format that data/archive.py reads."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def write_images(path: Path, images: Tensor, labels: Tensor | None) -> None:
    """Writes images uint8 [n, 3, h, w] and their labels int64 [n], if any, as a zip file (.zip) or else a folder.

    It appears under its name once it is complete. Raises FileExistsError if there is something but an empty folder, or
    OSError.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name, image in zip(names, images, strict=True):
                    archive.writestr(name, _png(image))
                if labels is not None:
                    archive.writestr("dataset.json", _labels(names, labels))
        else:
            partial.mkdir()
            for name, image in zip(names, images, strict=True):
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(_png(image))
            if labels is not None:
                (partial / "dataset.json").write_text(_labels(names, labels))
        partial.rename(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def _png(image: Tensor) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())).save(content, format="PNG")
    return content.getvalue()


def _labels(names: list[str], labels: Tensor) -> str:
    return json.dumps({"labels": list(map(list, zip(names, labels.tolist(), strict=True)))})
