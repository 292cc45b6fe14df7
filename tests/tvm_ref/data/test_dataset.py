"""The built-in data sets, reproducible noise, and the order of batches."""

from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvm_ref.data.dataset import BatchOrder, DataConfig, open_dataset
from tvm_ref.data.digits import real_digits
from tvm_ref.data.noise import indexed_normals
from tvm_ref.data.toys import DEVIATION, MOON_NOISE, RADIUS, ToyName, toy_points

TOYS = get_args(ToyName)
LEAST_P = 1e-6  # of a test against a distribution: a right implementation fails once in a million seeds


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "faces"},
        {"name": "archive"},
        {"name": "digits", "path": "x.zip"},
        {"name": "moons", "latents": "imagenet256"},
        {"name": "digits", "num_classes": 10},
        {"name": "archive", "path": "x.zip", "latents": "imagenet1024"},
        {"name": "archive", "path": "x.zip", "latents": True},
        {"name": "archive", "path": "x.zip", "num_classes": -1},
    ],
)
def test_settings_without_a_meaning_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError):
        DataConfig(**fields)


@given(
    seed=st.integers(0, 2**40),
    size=st.integers(1, 40),
    local=st.integers(1, 9),
    world=st.integers(1, 5),
    step=st.integers(0, 200),
)
def test_ranks_split_a_global_batch_that_does_not_depend_on_their_number(
    seed: int, size: int, local: int, world: int, step: int
) -> None:
    order = BatchOrder(seed=seed, size=size)
    parts = [order.indices(step, rank, world, local) for rank in range(world)]
    whole = order.indices(step, 0, 1, world * local)
    assert all(part.dtype == np.int64 and part.shape == (local,) for part in parts)
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(BatchOrder(seed=seed, size=size).indices(step, 0, 1, world * local), whole)


@given(seed=st.integers(0, 2**40), size=st.integers(1, 60), batch=st.integers(1, 25), epochs=st.integers(1, 4))
def test_every_epoch_goes_through_all_items_once(seed: int, size: int, batch: int, epochs: int) -> None:
    order = BatchOrder(seed=seed, size=size)
    steps = -(-size * epochs // batch)
    seen = np.concatenate([order.indices(step, 0, 1, batch) for step in range(steps)])[: size * epochs]
    for epoch in seen.reshape(epochs, size):
        assert np.array_equal(np.sort(epoch), np.arange(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [BatchOrder(seed=seed, size=1000).indices(epoch, 0, 1, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        assert not np.array_equal(one, np.arange(1000))
        assert not any(np.array_equal(one, other) for other in orders[:i])


@pytest.mark.parametrize("arguments", [(-1, 0, 1, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)])
def test_impossible_batches_are_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected step"):
        BatchOrder(seed=0, size=3).indices(*arguments)


@pytest.mark.parametrize(("seed", "size"), [(-1, 3), (0, 0)])
def test_impossible_orders_are_refused(seed: int, size: int) -> None:
    with pytest.raises(ValueError, match="an order needs"):
        BatchOrder(seed=seed, size=size)


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_functions_of_their_seed(name: ToyName) -> None:
    points = toy_points(name, 100, 3)
    assert points.dtype == np.float32 and points.shape == (100, 2)
    assert np.array_equal(points, toy_points(name, 100, 3))
    assert len(np.unique(np.concatenate([points, toy_points(name, 100, 4)]), axis=0)) == 200


@given(seed=st.integers(0, 2**32))
def test_eight_gaussians(seed: int) -> None:
    points = toy_points("eight_gaussians", 4000, seed).astype(np.float64)
    angle = np.arange(8) * np.pi / 4
    centres = RADIUS * np.stack([np.cos(angle), np.sin(angle)], 1)
    offsets = points[:, None] - centres
    nearest = (offsets**2).sum(-1).argmin(1)
    assert scipy.stats.chisquare(np.bincount(nearest, minlength=8)).pvalue > LEAST_P
    offset = offsets[np.arange(len(points)), nearest].ravel() / DEVIATION
    # Another mode is 3.8 deviations away from the middle between two, so that few points are taken for its neighbour's.
    assert scipy.stats.kstest(offset, "norm").pvalue > LEAST_P


@given(seed=st.integers(0, 2**32))
def test_checkerboard(seed: int) -> None:
    points = toy_points("checkerboard", 4000, seed).astype(np.float64)
    square = np.floor(points).astype(int)
    assert (np.abs(points) <= 2).all() and (square.sum(1) % 2 == 0).all()
    counts = np.unique(square, axis=0, return_counts=True)[1]
    assert len(counts) == 8 and scipy.stats.chisquare(counts).pvalue > LEAST_P
    for axis in range(2):
        assert scipy.stats.kstest(points[:, axis] - square[:, axis], "uniform").pvalue > LEAST_P


@given(seed=st.integers(0, 2**32))
def test_moons(seed: int) -> None:
    x, y = (toy_points("moons", 2000, seed).astype(np.float64) / 1.5 + [0.5, 0.25]).T
    upper, lower = np.hypot(x, y) - 1, np.hypot(x - 1, y - 0.5) - 1
    off = np.where(np.abs(upper) < np.abs(lower), upper, lower)
    assert np.abs(off).max() < 7 * MOON_NOISE  # of 4000 normal numbers, one in 10^8 times is larger
    assert (y > 0.75).any() and (y < -0.25).any()  # both moons


def test_unknown_toys_are_refused() -> None:
    with pytest.raises(ValueError, match="'spiral'"):
        toy_points("spiral", 10, 0)
    with pytest.raises(ValueError, match="count 0"):
        toy_points("moons", 0, 0)


@pytest.mark.parametrize("name", TOYS)
def test_the_dataset_of_a_toy_is_points_with_one_label(name: ToyName) -> None:
    dataset = open_dataset(DataConfig(name=name))
    x, labels = dataset.get(np.array([5, 0, 5]), torch.Generator())
    assert dataset.shape == x.shape[1:] == (2, 1, 1) and dataset.num_classes == 0
    assert x.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1]) and not labels.any()
    assert np.array_equal(x[0].flatten().numpy(), toy_points(name, len(dataset), 0)[5])


def test_digits_are_the_real_ones_and_none_that_is_held_out() -> None:
    real, dataset = real_digits(), open_dataset(DataConfig(name="digits"))
    x, labels = dataset.get(np.arange(len(dataset)), torch.Generator())
    assert dataset.shape == x.shape[1:] == (1, 8, 8) and dataset.num_classes == 10
    assert x.dtype == torch.float32 and labels.dtype == torch.int64
    assert (x.min(), x.max()) == (-1, 1)
    train = ~real.held_out
    assert np.array_equal((x[:, 0].numpy() + 1) / 2, real.images[train])  # sixteenths: exact
    assert np.array_equal(labels.numpy(), real.labels[train])


def test_held_out_digits_are_a_fixed_share_of_each_class() -> None:
    real = real_digits()
    assert len(real.labels) == 1797 and real.held_out.sum() == 300
    share = 300 / 1797
    for digit in range(10):
        of_class = real.labels == digit
        assert abs(real.held_out[of_class].sum() - share * of_class.sum()) < 1
    assert np.array_equal(real.held_out, real_digits().held_out)


@given(key=st.integers(0, 2**64 - 1), indices=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6))
def test_indexed_noise_depends_on_key_and_index_only(key: int, indices: list[int]) -> None:
    together = indexed_normals(key, indices, (2, 3))
    apart = torch.cat([indexed_normals(key, [index], (2, 3)) for index in indices])
    assert together.dtype == torch.float32 and torch.equal(together, apart)
    assert not torch.equal(together[0], indexed_normals(key ^ 1, indices, (2, 3))[0])


def test_indexed_noise_is_standard_normal_within_and_across_indices() -> None:
    noise = indexed_normals(7, range(4000), (2,)).double()
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > LEAST_P
    for sums in (noise.sum(1), noise[1:, 0] + noise[:-1, 0], noise[:, 0] + indexed_normals(8, range(4000), (2,))[:, 0]):
        assert scipy.stats.kstest(sums.numpy() / 2**0.5, "norm").pvalue > LEAST_P


@pytest.mark.parametrize(("key", "index"), [(-1, 0), (0, -1), (2**64, 0)])
def test_indexed_noise_refuses_keys_out_of_range(key: int, index: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        indexed_normals(key, [index], (1,))
