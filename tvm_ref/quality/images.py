"""Evaluation of images: samples drawn in parts by any number of processes, and compared with real ones by features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.archive import ImageArchive
from ..data.archive_writer import write_archive
from ..data.dataset import BatchOrder, DataConfig, open_dataset
from ..data.fingerprint import digest_of_files, fingerprint
from ..data.vae import load_vae
from ..model.dit import DiT
from ..sampling.grids import decoded, to_uint8
from ..sampling.image_files import image_name, png
from ..training.parallel import World
from ..unfinished import Tensors, Unfinished, is_delivered
from .evaluation import Evaluation, Sampling, cycle_errors
from .inception import DETECTOR_URL, InceptionDetector
from .metrics import frechet_distance, precision_recall
from .reference import load_moments
from .vit import VitFeatures

PROBE = 64  # height and width of the image that every network is tried with
LEAST_SAMPLES = 4  # of which three are the nearest neighbours of one
# Metrics of each feature network. Only Inception's Frechet distance is called FID.
METRICS = {"inception": ("fid", "precision", "recall"), "vit": ("fd_vit", "precision_vit", "recall_vit")}


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Local files: feature networks, what samples are compared with, and the decoder of latents."""

    inception: Path | None = None
    reference: Path | None = None
    features: Path | None = None
    features_reference: Path | None = None
    reference_images: Path | None = None
    vae: Path | None = None


class FeatureNetwork(Protocol):
    """Turns images uint8 [n, 3, H, W] into features float32 [n, d] on the CPU."""

    def features(self, images: Tensor) -> Tensor: ...


class ImageJudge:
    """Compares samples with real images. All files are loaded and checked when it is made.

    Raises FileNotFoundError and ValueError that say which option to give or what to download.
    """

    def __init__(self, files: ImageFiles, data: DataConfig, count: int, device: torch.device) -> None:
        """count: the number of samples that will be judged."""
        if files.inception is None and files.features is None:
            raise ValueError(f"FID needs Inception weights: fetch {DETECTOR_URL} and pass --inception FILE")
        self.files, self._data = files, data
        self._networks: dict[str, FeatureNetwork] = {}
        self._moments = {}
        for word, file, reference, name, made in (
            ("inception", files.inception, files.reference, "reference", InceptionDetector),
            ("vit", files.features, files.features_reference, "features_reference", VitFeatures),
        ):
            option = f"--{name.replace('_', '-')}"
            if file is None and reference is not None:
                raise ValueError(f"{name}: {option} needs the network whose statistics it has")
            if file is not None and reference is None and files.reference_images is None:
                raise ValueError(
                    f"{METRICS[word][0].upper()} needs {option} (statistics, .npz or .pkl) or --reference-images (zip "
                    "file or folder)"
                )
            if file is not None:
                self._networks[word] = made(file, device)
            if reference is not None:
                self._moments[word] = load_moments(reference)
        if (data.latents is not None) != (files.vae is not None):
            expected = "needs --vae FOLDER to decode them" if data.latents is not None else "takes no --vae"
            raise ValueError(f"a network of {'latents' if data.latents is not None else 'images'} {expected}")
        self._archive = ImageArchive(files.reference_images, 0) if files.reference_images is not None else None
        if self._archive is not None and min(count, len(self._archive)) < LEAST_SAMPLES:
            raise ValueError(
                f"precision and recall need {LEAST_SAMPLES} images, got {count} samples and {len(self._archive)} real"
            )
        for word, moments in self._moments.items():
            width = self._networks[word].features(torch.zeros(1, 3, PROBE, PROBE, dtype=torch.uint8)).shape[1]
            if moments.mean.shape != (width,):
                raise ValueError(f"{word}: expected statistics of {width} features, got {len(moments.mean)}")
        self._vae = load_vae(files.vae, device) if files.vae is not None else None

    def fingerprint(self) -> dict[str, Any]:
        """Digests of the files, and of the listing of the real images."""
        found: dict[str, Any] = {}
        for name, path in vars(self.files).items():
            if path is None or name == "reference_images":
                found[name] = None
            elif name == "vae":
                found[name] = digest_of_files(path / "config.json", path / "diffusion_pytorch_model.safetensors")
            else:
                found[name] = digest_of_files(path)
        listing = fingerprint(self._archive) if self._archive is not None else {}
        return found | {f"reference_images.{name}": value for name, value in listing.items()}

    def chosen(self, count: int, seed: int) -> np.ndarray:
        """The numbers of the real images to compare with: `count`, or all if there are fewer, chosen by the seed."""
        if self._archive is None:
            return np.empty(0, dtype=np.int64)
        return BatchOrder(seed=seed, size=len(self._archive)).indices(0, 0, 1, min(count, len(self._archive)))

    def real(self, indices: np.ndarray) -> Tensors:
        """Features of real images by their numbers."""
        assert self._archive is not None
        return self.features(self._archive.pixels(indices))

    def pictures(self, samples: Tensor) -> Tensor:
        """Samples of the network as images uint8 [n, 3, H, W]; latents are decoded."""
        if self._data.latents is not None and self._vae is not None:
            samples = decoded(samples, self._data.latents, self._vae)
        return to_uint8(samples)

    def features(self, images: Tensor) -> Tensors:
        """Features of images by each network."""
        return {word: network.features(images) for word, network in self._networks.items()}

    def figures(self, generated: Tensors, real: Tensors | None) -> dict[str, float]:
        """The metrics, in float64, of features float32 [n, d] of samples, and those [m, d] of real images, if any."""
        found = {}
        for word in self._networks:
            frechet, precision, recall = METRICS[word]
            target = self._moments[word] if word in self._moments else (real or {})[word]
            found[frechet] = frechet_distance(generated[word], target)
            if real is not None:
                covered = precision_recall(generated[word].double(), real[word].double())
                found |= {precision: covered.precision, recall: covered.recall}
        return found


def evaluate_images(
    model: DiT,
    data: DataConfig,
    nfes: tuple[int, ...],
    count: int,
    sampling: Sampling,
    judge: ImageJudge,
    work: Unfinished,
    world: World,
    *,
    save: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates a network of images or latents by FID and its like. Every process of `world` calls it.

    Draws `count` samples with labels uniform over the classes. Which process draws a sample does not change it. Parts
    that are finished lie in `work`. Context: the cycle errors.

    save: a zip file or a folder for the samples; with several NFEs, see `path_of_images`.
    stop: asked before each part; if any process says so, all of them end.

    Returns the result in the first process; None in the others, and where it was stopped.
    """
    classes = max(model.config.num_classes, 1)
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(sampling.seed))
    chosen = judge.chosen(count, sampling.seed)
    context = cycle_errors(model, open_dataset(data), sampling)

    def make(name: str) -> Tensors:
        kind, _, first = name.rpartition("-")
        here = slice(int(first), int(first) + sampling.batch)
        if kind == "real":
            return judge.real(chosen[here])
        (samples,) = sampling.draw(model, labels[here], int(kind.removeprefix("nfe-")), start=here.start)
        images = judge.pictures(samples)
        return judge.features(images) | (_as_png(images.cpu()) if save is not None else {})

    real = [f"real-{first:08d}" for first in range(0, len(chosen), sampling.batch)]
    drawn = {nfe: [f"nfe-{nfe}-{first:08d}" for first in range(0, count, sampling.batch)] for nfe in nfes}
    # One kind after the other: parts of one kind call the network equally often, as sharded weights need.
    kinds = {"batches of real images": real} | {f"batches at {nfe} NFE": names for nfe, names in drawn.items()}
    for title, names in kinds.items():
        if not work.complete(names, make, stop=stop, title=title):
            return None
    if not world.first:
        return None
    of_real = _together(work, real) if real else None
    by_nfe = {nfe: judge.figures(_together(work, names), of_real) for nfe, names in drawn.items()}
    if save is not None:
        for nfe, names in drawn.items():
            path = path_of_images(save, nfe, nfes)
            if not is_delivered(work.folder, path):
                work.deliver(path, partial(_write, zipped=path.suffix == ".zip", work=work, names=names, labels=labels))
    return Evaluation(count, by_nfe, context)


def path_of_images(save: Path, nfe: int, nfes: tuple[int, ...]) -> Path:
    """Where the samples of an NFE are saved: samples.zip, or samples-nfe-2.zip if there are several NFEs."""
    return save if len(nfes) == 1 else save.with_name(f"{save.stem}-nfe-{nfe}{save.suffix}")


def _together(work: Unfinished, names: list[str]) -> Tensors:
    """The features in some parts, one after the other."""
    parts = [{key: x for key, x in work.read(name).items() if key in METRICS} for name in names]
    return {word: torch.cat([part[word] for part in parts]) for word in parts[0]}


def _as_png(images: Tensor) -> Tensors:
    files = [png(image) for image in images]
    return {"png": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8),
            "sizes": torch.tensor([len(file) for file in files])}  # fmt: skip


def _write(path: Path, *, zipped: bool, work: Unfinished, names: list[str], labels: Tensor) -> None:
    def files() -> Iterator[tuple[str, bytes]]:
        index = 0
        for name in names:
            part = work.read(name)
            for file in part["png"].split(part["sizes"].tolist()):
                yield image_name(index), file.numpy().tobytes()
                index += 1

    write_archive(path, files(), [(image_name(i), x) for i, x in enumerate(labels.tolist())], zipped=zipped)
