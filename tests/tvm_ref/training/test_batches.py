"""The global batch of a step does not depend on the number of processes and micro-batches."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tvm_ref.runs import change, digits
from tvm_ref.data.dataset import DataConfig, open_dataset
from tvm_ref.objective.loss import Batch, LossConfig
from tvm_ref.training.batches import UNIT, Batches
from tvm_ref.training.config import ConfigError, TrainConfig
from tvm_ref.training.parallel import World

CPU = torch.device("cpu")
CONFIG = digits(Path("run"), batch=48)
DATASET = open_dataset(CONFIG.data)


def whole(size: int, accumulate: int, step: int) -> Batch:
    """The global batch of a step, concatenated from all parts."""
    config = change(CONFIG, accumulate=accumulate)
    parts = [part for rank in range(size) for part in Batches(config, DATASET, World(rank, size, CPU)).draw(step)]
    assert all(len(part.x0) == 48 // size // accumulate for part in parts)
    return Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


@given(st.sampled_from([(1, 2), (2, 1), (3, 1), (4, 3), (2, 4), (48, 1)]), st.integers(0, 1000))
def test_the_global_batch_is_the_same_for_every_split(split: tuple[int, int], step: int) -> None:
    one, other = whole(1, 1, step), whole(*split, step)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_steps_seeds_and_places_draw_differently() -> None:
    one = whole(1, 1, 0)
    other_step = whole(1, 1, 1)
    other_seed = Batches(change(CONFIG, seed=1), DATASET, World(0, 1, CPU)).draw(0)[0]
    noises = [*one.x1.split(UNIT), *other_step.x1.split(UNIT), *other_seed.x1.split(UNIT)]
    assert len({noise.flatten()[0].item() for noise in noises}) == len(noises)
    assert not torch.equal(one.x0, other_step.x0)
    assert not torch.equal(one.x0, other_seed.x0)


def test_the_stream_is_the_batches_of_the_steps_in_turn() -> None:
    batches = Batches(CONFIG, DATASET, World(0, 1, CPU))
    stream = batches.steps(5)
    for step in (5, 6, 7):
        (got,), (expected,) = stream.take(), batches.draw(step)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    stream.close()


def test_an_error_of_the_data_reaches_the_run() -> None:
    class Broken:
        shape, num_classes = (1, 8, 8), 10

        def __len__(self) -> int:
            return 100

        def get(self, indices: object, draw: object) -> tuple[torch.Tensor, torch.Tensor]:
            raise OSError("image 7 cannot be read")

    with pytest.raises(OSError, match="image 7"):
        Batches(CONFIG, Broken(), World(0, 1, CPU)).steps(0).take()


def test_labels_out_of_range_are_refused() -> None:
    class Wrong:
        shape, num_classes = (1, 8, 8), 10

        def __len__(self) -> int:
            return 100

        def get(self, indices: object, draw: object) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(48, 1, 8, 8), torch.full((48,), 11)

    with pytest.raises(ValueError, match=r"labels: expected 0\.\.10"):
        Batches(CONFIG, Wrong(), World(0, 1, CPU)).draw(0)


def test_a_batch_that_cannot_be_split_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"48 cannot be split evenly over 5 processes .* a multiple of 5"):
        Batches(CONFIG, DATASET, World(0, 5, CPU))


def test_data_of_another_shape_are_refused() -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, image_size=4, patch=2))
    with pytest.raises(ConfigError, match=r"shape \(1, 8, 8\) .* takes \(1, 4, 4\)"):
        Batches(config, DATASET, World(0, 1, CPU))


def mirrors(tmp_path: Path) -> TrainConfig:
    """A run on an archive of images whose left half is dark, so that a mirrored one is known."""
    for i in range(20):
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[:, 2:] = 100 + i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = DataConfig(name="archive", path=str(tmp_path), flip=True)
    model = dataclasses.replace(CONFIG.model, image_size=4, patch=2, channels=3, num_classes=0)
    return dataclasses.replace(CONFIG, data=data, model=model, loss=LossConfig(w=1.0))


def test_images_are_mirrored_at_random_and_alike_for_every_split(tmp_path: Path) -> None:
    config = mirrors(tmp_path)
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=False))
    dataset = open_dataset(config.data)

    def drawn(config: TrainConfig, size: int, accumulate: int, step: int) -> Batch:
        config = change(config, accumulate=accumulate)
        parts = [part for rank in range(size) for part in Batches(config, dataset, World(rank, size, CPU)).draw(step)]
        return Batch(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    chosen = []
    for step in range(4):
        with_flip, without = drawn(config, 1, 1, step), drawn(plain, 1, 1, step)
        is_mirrored = (with_flip.x0[:, 0, 0, 0] > with_flip.x0[:, 0, 0, -1]).tolist()
        for mirrored, found, original in zip(is_mirrored, with_flip.x0, without.x0, strict=True):
            assert torch.equal(found, original.flip(-1) if mirrored else original)
        assert all(torch.equal(x, y) for x, y in zip(with_flip[1:], without[1:], strict=True))
        assert torch.equal(drawn(config, 4, 3, step).x0, with_flip.x0)
        chosen.append(is_mirrored)
    count = sum(map(sum, chosen))
    assert abs(count - 4 * 48 / 2) < 6 * (4 * 48 / 4) ** 0.5  # six standard deviations
    assert len(set(map(tuple, chosen))) == 4  # steps choose differently
