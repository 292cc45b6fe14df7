"""Coverage, the classifier, and the figures by its features."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tvm_ref.data.dataset import DataConfig
from tvm_ref.quality.classifier import Recipe, train_classifier
from tvm_ref.quality.feature_judge import FeatureJudge, feature_judge
from tvm_ref.quality.metrics import coverage

CPU = torch.device("cpu")


def test_coverage_counts_real_vectors_with_a_generated_one_in_their_ball() -> None:
    real = torch.arange(12, dtype=torch.float64)[:, None]  # of the inner ones, the 2nd neighbour is 1 away
    assert coverage(real, real, 2) == 1
    assert coverage(torch.tensor([[3.9], [4.1], [100.0]]).double(), real, 2) == 3 / 12  # 3, 4 and 5
    assert coverage(torch.full((50, 1), 1e6).double(), real, 2) == 0
    with pytest.raises(ValueError, match="more than 5"):
        coverage(real, real[:5])
    with pytest.raises(ValueError, match="one length"):
        coverage(real.repeat(1, 2), real)


def test_coverage_is_that_of_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, 60, 3, dtype=torch.float64, generator=draw)
    generated = generated + 1
    apart = torch.cdist(real, real)
    radius = apart.sort(1).values[:, 5]
    expected = ((torch.cdist(real, generated) <= radius[:, None]).any(1)).double().mean().item()
    assert 0 < expected < 1 and coverage(generated, real) == expected


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical stripes with noise."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 2
    pattern = torch.tensor([1.0, -1.0]).repeat(4).expand(8, 8)
    images = torch.where(labels[:, None, None] == 0, pattern, pattern.T)[:, None]
    return (images + 0.3 * torch.randn(count, 1, 8, 8, generator=draw)).clamp(-1, 1), labels


def test_the_classifier_learns_and_is_a_function_of_its_recipe() -> None:
    images, labels = stripes(200)
    recipe = Recipe(width=4, epochs=4, batch=20)
    before = torch.random.get_rng_state()
    one, two = (train_classifier(images[:160], labels[:160], recipe, CPU) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    features, found = one.judged(images[160:])
    assert torch.equal(found, labels[160:])
    assert features.shape == (40, 64) and torch.equal(features, two.judged(images[160:])[0])
    other = train_classifier(images[:160], labels[:160], Recipe(width=4, epochs=4, batch=20, seed=1), CPU)
    assert not torch.equal(features, other.judged(images[160:])[0])


@pytest.fixture(scope="module")
def judge() -> FeatureJudge:
    return feature_judge(DataConfig(name="digits"), CPU)


def test_real_digits_are_near_themselves_and_noise_is_far(judge: FeatureJudge) -> None:
    assert judge.held_out_accuracy > 0.95
    floor = judge.bootstrap(600, 0)
    noise = judge.judge(torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0)), judge.labels[:600])
    assert floor.precision == 1 and floor.recall > 0.8 and floor.coverage > 0.8
    assert noise.frechet > 20 * floor.frechet and noise.accuracy < 0.3
    assert noise.coverage < 0.2 and noise.precision < 0.5
    assert np.isfinite(noise).all() and judge.bootstrap(600, 0) == floor != judge.bootstrap(600, 1)


def test_what_cannot_be_judged_is_refused(judge: FeatureJudge) -> None:
    bad = torch.zeros(10, 1, 8, 8)
    bad[3, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="samples: expected finite"):
        judge.judge(bad, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="data: expected digits or fashion"):
        FeatureJudge(DataConfig(name="moons"), CPU)
