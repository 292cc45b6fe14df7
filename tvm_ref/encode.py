"""Encodes a folder of images as VAE latents: `python -m tvm_ref.encode IMAGES --vae FOLDER --out FILE.zip`.

Several processes share the work: `torchrun --nproc-per-node 8 -m tvm_ref.encode ...`.
"""

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from flashjvp_commands import ending, outputs

from .arguments import check_common, check_out, parsed
from .data.archive import LABEL_FILE, MOST_PIXELS, DatasetError, LatentArchive, checked_labels
from .data.archive_writer import write_archive
from .data.fingerprint import digest_of_files
from .data.untrusted import MOST_JSON, one_line, open_regular, parse_json, read_regular, shown
from .data.vae import encode, load_vae
from .training.checkpoint import ALONE
from .training.parallel import World, leave, world_on
from .training.run_lock import RunLockedError
from .unfinished import Tensors, Unfinished, beside, is_delivered, remove, together

MOST_SIZE = 8192  # height and width of an image of MOST_PIXELS
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode a folder of images with a Stable Diffusion VAE into an uncompressed zip file of latents.

    Labels come from IMAGES/dataset.json if it exists. Otherwise each folder directly under IMAGES is a class, numbered
    from 0 in the order of their names (the layout of ImageNet). If all images lie directly in IMAGES, without
    dataset.json, the archive has no labels. Every image is converted to RGB, cropped to its central square and resized.

    What is finished is kept beside --out, also after Ctrl-C or kill -9. The same command goes on from there and makes
    the same archive. With torchrun, several processes share the work.
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
    max_bad: int = 0
    """Images that cannot be read: so many, over all processes, are named and skipped; one more stops the command."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device that the VAE runs on: cpu, cuda, cuda:1. With torchrun, cuda is a GPU for each process."""

    def __post_init__(self) -> None:
        check_common(device=self.device, batch=self.batch)
        if not (8 <= self.size <= MOST_SIZE and self.size % 8 == 0):
            raise ValueError(f"size: expected a multiple of 8, from 8 to {MOST_SIZE}, got {self.size}")
        if self.max_bad < 0:
            raise ValueError(f"max_bad: expected at least 0, got {self.max_bad}")
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


class Encoded(NamedTuple):
    """What an archive holds, and how many bad images it lacks."""

    images: int
    bad: int


def encode_folder(config: EncodeConfig, world: World = ALONE) -> Encoded:
    """Writes the archive. The file appears under its name once it is complete. Every process of `world` calls it.

    Raises FileExistsError if it exists already, DatasetError for a bad image too many, UnfinishedError for unfinished
    work with other settings, and RunLockedError.
    """
    names, labels = list_images(config.images)
    if together(world, lambda: _is_finished(config.out)):
        images = len(LatentArchive(config.out, 0, "imagenet256"))
        return Encoded(images, len(names) - images)
    vae = load_vae(config.vae, world.device)
    settings = {
        "size": config.size, "batch": config.batch,
        "vae": digest_of_files(config.vae / "config.json", config.vae / "diffusion_pytorch_model.safetensors"),
    }  # fmt: skip
    with Unfinished(config.out, settings, world) as work:
        bad = BadImages(work.folder / "bad", config.max_bad)
        parts = together(world, lambda: _parts(config, names, work, bad))

        def make(part: str) -> Tensors:
            first = int(part.split("-")[1])
            good, images = [], []
            for index in range(first, min(first + config.batch, len(names))):
                try:
                    images.append(read_square(config.images / names[index], config.size))
                    good.append(index)
                except DatasetError as error:
                    bad.add(part, index, error)
            latents = encode(vae, torch.stack(images)) if images else torch.empty(0)
            return {"index": torch.tensor(good, dtype=torch.int64), "latents": latents}

        def finish() -> Encoded:
            encoded = Encoded(len(names) - bad.count(), bad.count())
            if not encoded.images:
                raise DatasetError(f"{config.images}: none of its {len(names)} images can be read")
            work.deliver(config.out, lambda draft: _write(draft, work, parts, labels))
            work.remove()
            return encoded

        work.complete(parts, make, title="batches")
        return together(world, finish)


def _is_finished(out: Path) -> bool:
    """Whether the archive was written by a command that was then killed, whose folder this removes."""
    if not out.exists():
        return False
    if not is_delivered(beside(out), out):
        raise FileExistsError(f"{out} exists; expected a new file to write to")
    remove(beside(out))
    return True


class BadImages:
    """The images that were skipped, a file for each, which all processes see."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most

    def count(self) -> int:
        """How many there are."""
        return sum(1 for _ in self._folder.iterdir()) if self._folder.is_dir() else 0

    def add(self, part: str, index: int, error: DatasetError) -> None:
        """Names an image and skips it. Raises DatasetError if that is one too many."""
        self._folder.mkdir(exist_ok=True)
        note = self._folder / f"{part}-{index}"
        if note.exists():  # by another process, which makes the same part
            return
        note.write_text(str(error))
        self._check(str(error))
        print(f"skipped bad image {self.count()} of at most {self._most}: {error}", file=sys.stderr, flush=True)

    def keep_those_of(self, work: Unfinished) -> None:
        """Forgets those whose part is not finished, which are read again. Raises DatasetError if too many are left."""
        notes = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        for note in notes:
            if not work.has(note.name.rpartition("-")[0]):
                note.unlink()
        for note in filter(Path.exists, notes):
            self._check(note.read_text())

    def _check(self, text: str) -> None:
        if (count := self.count()) > self._most:
            limit = f" ({count} bad images, and max_bad = {self._most})"
            raise DatasetError(f"{text}{limit if self._most else ''}; --max-bad allows bad images")


def _parts(config: EncodeConfig, names: list[str], work: Unfinished, bad: BadImages) -> list[str]:
    """Names the parts, each by its first image and by what the files in it were. Checks the room on the disk."""
    parts = []
    for first in range(0, len(names), config.batch):
        found = [(name, *_size_and_time(config.images / name)) for name in names[first : first + config.batch]]
        digest = hashlib.sha256(repr(found).encode()).hexdigest()
        parts.append(f"images-{first:08d}-{digest[:16]}")
    bad.keep_those_of(work)
    item = 8 * (config.size // 8) ** 2 * 4 + 512  # with the headers of the item and of the zip file
    left = sum(not work.has(part) for part in parts) * config.batch
    needed, free = item * (left + len(names)), shutil.disk_usage(work.folder).free
    if needed > free:
        raise OSError(
            f"out: expected {needed / 2**30:.3g} GiB of free disk space, for finished parts and for the archive, got "
            f"{free / 2**30:.3g} GiB at {work.folder}"
        )
    return parts


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # it is a bad image, as is said when it is read
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _write(path: Path, work: Unfinished, parts: list[str], labels: list[int] | None) -> None:
    entries: list[tuple[str, int]] | None = None if labels is None else []

    def items() -> Iterator[tuple[str, bytes]]:
        for part in parts:
            tensors = work.read(part)
            for index, latent in zip(tensors["index"].tolist(), tensors["latents"].numpy(), strict=True):
                name = f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"
                content = io.BytesIO()
                np.save(content, latent, allow_pickle=False)
                if entries is not None and labels is not None:
                    entries.append((name, labels[index]))
                yield name, content.getvalue()

    write_archive(path, items(), entries, zipped=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    try:
        config = parsed(EncodeConfig, "tvm_ref.encode", arguments)
        with world_on(config.device) as this:
            delivered = lambda path: is_delivered(beside(path), path)  # noqa: E731
            out = outputs.prepared(config.out, "latents.zip", (".zip",), delivered)
            encoded = encode_folder(replace(config, out=out), this)
    except (outputs.OutputError, FileExistsError) as error:
        raise ending.unusable(f"out: {error}") from error
    except (OSError, ValueError, RunLockedError) as error:
        raise SystemExit(f"error: {error}") from error
    if this.first:
        skipped = f", {encoded.bad} bad ones skipped" if encoded.bad else ""
        print(f"{encoded.images} images encoded into {out}{skipped}")


if __name__ == "__main__":
    leave(ending.run(main))
