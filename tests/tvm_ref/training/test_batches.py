"""The global batch of a step does not depend on the number of processes and micro-batches."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tvm_ref.runs import change, digits
from tvm_ref.data.dataset import open_dataset
from tvm_ref.objective.loss import Batch
from tvm_ref.training.batches import UNIT, Batches
from tvm_ref.training.config import ConfigError
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
