"""Reading archives of images and latents: pixels, labels, normalised samples of the posterior."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from tests.tvm_ref.data.archives import (
    ALL,
    LABELS,
    MEANS,
    PIXELS,
    Store,
    as_folder,
    images,
    latents,
    npy,
    stores,
)
from tvm_ref.data.archive import ImageArchive, LatentArchive
from tvm_ref.data.dataset import DataConfig, open_dataset
from tvm_ref.data.latents import LATENT_STATISTICS, denormalise, normalise
from verify.budget.metric_tolerance import normalisation_bound


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
