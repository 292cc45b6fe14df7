"""Encodes a folder of images as VAE latents: `python -m tvm_ref.encode IMAGES --vae FOLDER --out FILE.zip`."""

import io
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from rich.progress import track
from torch import Tensor

from flashjvp_commands import ending, outputs
from flashjvp_commands.entry import program

from .arguments import check_common, check_out, parsed
from .data.archive import LABEL_FILE, MOST_PIXELS, DatasetError, checked_labels
from .data.untrusted import MOST_JSON, one_line, open_regular, parse_json, read_regular, shown
from .data.vae import encode, load_vae

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode a folder of images with a Stable Diffusion VAE into an uncompressed zip file of latents.

    Labels come from IMAGES/dataset.json if it exists. Otherwise each folder directly under IMAGES is a class, numbered
    from 0 in the order of their names (the layout of ImageNet). If all images lie directly in IMAGES, without
    dataset.json, the archive has no labels. Every image is converted to RGB, cropped to its central square and resized.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder of PNG, JPEG or WebP files, at any depth."""
    vae: Path
    """Folder of a diffusers AutoencoderKL."""
    out: Path
    """The zip file to write, or a folder for latents.zip; folders are made, and no file is replaced."""
    size: int = 256
    """Height and width to resize images to before encoding, a multiple of 8."""
    batch: int = 32
    """Batch size of encoding."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device that the VAE runs on: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        check_common(device=self.device)
        check_out(self.out, ".zip")


def list_images(folder: Path) -> tuple[list[str], list[int] | None]:
    """Lists the names of the images under `folder`, sorted, and their labels (None: unlabelled); see EncodeConfig.

    Raises FileNotFoundError and DatasetError naming what is missing, unlabelled or unreadable.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise DatasetError(f"{folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if (folder / LABEL_FILE).exists():
        return names, _labels_of_file(folder / LABEL_FILE, names)
    at_top = [name for name in names if "/" not in name]
    if len(at_top) == len(names):
        return names, None
    if at_top:
        raise DatasetError(f"{folder}: {at_top[0]} lies in no class folder, but other images do")
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: index for index, name in enumerate(classes)}
    return names, [number[name.split("/")[0]] for name in names]


def _labels_of_file(path: Path, names: list[str]) -> list[int]:
    try:
        entries = parse_json(read_regular(path, MOST_JSON))["labels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f'{path}: expected {{"labels": [[file name, class index], ...]}} ({one_line(error)})'
        ) from error
    if not isinstance(entries, list):
        raise DatasetError(f"{path}: expected a list of labels, got {shown(entries)}")
    labels = checked_labels(entries, 2**31, str(path))  # training checks the number of classes
    if different := labels.keys() ^ set(names):
        raise DatasetError(f"{path}: labels and images differ, first in {min(different)}")
    return [labels[name] for name in names]


def read_square(path: Path, size: int) -> Tensor:
    """Reads an image as RGB, crops its central square and resizes it (Lanczos): uint8 [3, size, size]."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"expected at most {MOST_PIXELS} pixels, got {image.width} x {image.height}")
            whole = image.convert("RGB")
    except Exception as error:  # damaged bytes make Pillow raise errors of many types
        raise DatasetError(f"{path}: {error or type(error).__name__}") from error
    side = min(whole.size)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    square = whole.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def encode_folder(config: EncodeConfig) -> int:
    """Writes the archive and returns the number of images. The file appears under its name once it is complete.

    Raises FileExistsError if it exists already, ValueError for a bad size, DatasetError for a bad image.
    """
    if config.size < 8 or config.size % 8 or config.batch < 1:
        raise ValueError(
            f"expected size to be a positive multiple of 8 and batch >= 1, got size {config.size}, batch {config.batch}"
        )
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; expected a new file to write to")
    names, labels = list_images(config.images)
    vae = load_vae(config.vae, torch.device(config.device))
    partial = config.out.with_name(f".{config.out.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "x", zipfile.ZIP_STORED) as archive:
            entries: list[tuple[str, int]] = []
            for first in track(range(0, len(names), config.batch), description="encoding"):
                chunk = names[first : first + config.batch]
                images = torch.stack([read_square(config.images / name, config.size) for name in chunk])
                for index, latent in enumerate(encode(vae, images).cpu().numpy(), start=first):
                    target = f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"
                    content = io.BytesIO()
                    np.save(content, latent, allow_pickle=False)
                    archive.writestr(target, content.getvalue())
                    if labels is not None:
                        entries.append((target, labels[index]))
            archive.writestr(LABEL_FILE, json.dumps({"labels": entries if labels is not None else None}))
        partial.replace(config.out)
    finally:
        partial.unlink(missing_ok=True)
    return len(names)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        config = parsed(lambda: tyro.cli(EncodeConfig, prog=program("tvm_ref.encode"), args=arguments))
        config = replace(config, out=outputs.prepared(config.out, "latents.zip", (".zip",), lambda path: False))
        count = encode_folder(config)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{count} images encoded into {config.out}")


if __name__ == "__main__":
    sys.exit(ending.run(main))
