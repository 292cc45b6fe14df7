"""The classifier of ImageNet: what it refuses, and what it is for. tests/clients compares it with timm's."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tvm_ref.quality.random_classifier import random_weights
from tvm_ref.data.dataset import DataConfig
from tvm_ref.quality import feature_judge
from tvm_ref.quality.imagenet_classifier import ImageNetClassifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "random.pth"
    torch.save(random_weights(), path, _use_new_zipfile_serialization=False)  # as the published file
    return path


def changed(weights: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    name, other = "_blocks.3._depthwise_conv.weight", "_fc.bias"
    return {
        f"{name}: expected \\(144, 1, 5, 5\\), got \\(144, 1, 3, 3\\)": lambda: {
            **weights,
            name: torch.ones(144, 1, 3, 3),
        },
        f"{name}: expected \\(144, 1, 5, 5\\), got None": lambda: {k: v for k, v in weights.items() if k != name},
        "more: expected None, got \\(2,\\)": lambda: {**weights, "more": torch.ones(2)},
        f"{other}: expected finite floating-point": lambda: {**weights, other: weights[other] / 0},
        f"{other}: expected finite floating": lambda: {**weights, other: weights[other].long()},
        "expected a state dict": lambda: [weights[other]],
        "expected a state dict, ": lambda: {other: 3},
    }


CHANGED = changed(random_weights())


@pytest.mark.parametrize("message", CHANGED)
def test_other_files_are_refused_by_name(message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(CHANGED[message](), path)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        ImageNetClassifier(path, CPU)


def test_a_file_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "code.pth"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match="print"):
        ImageNetClassifier(path, CPU)
    with pytest.raises(FileNotFoundError):
        ImageNetClassifier(tmp_path / "none.pth", CPU)


def test_features_of_an_image_do_not_depend_on_the_others(file: Path) -> None:
    network = ImageNetClassifier(file, CPU)
    images = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
    features = network.features(images)
    assert features.shape == (3, 1280) and network.logits(images[:1]).shape == (1, 1000)
    difference = (network.features(images[1:2]) - features[1:2]).abs().max()
    assert difference < (features[0] - features[1]).abs().max() / 1000  # rounding; what an image differs by is more
    with pytest.raises(ValueError, match="uint8"):
        network.features(images.float())


class Pooled:
    """Stands in for the network, which takes a CPU minutes: 16 means of a picture."""

    def __init__(self, path: Path, device: torch.device) -> None:
        assert path.exists() and device == CPU

    def features(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return F.adaptive_avg_pool2d(images[:, :1].float(), 4).flatten(1)


def test_the_judge_compares_with_real_images(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = feature_judge._digits()
    few = real._replace(compared=real.compared[:200])
    monkeypatch.setattr(feature_judge, "_digits", lambda: few)
    monkeypatch.setattr(feature_judge, "ImageNetClassifier", Pooled)
    judge = feature_judge.ImageNetJudge(DataConfig(name="digits"), file, CPU)
    same = judge.judge(few.compared)
    assert abs(same.frechet) < 1e-6 and same[1:] == (1.0, 1.0, 1.0)
    noise = torch.rand(few.compared.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = judge.judge(noise)
    assert other.frechet > 4 * judge.bootstrap(200, 0).frechet and other.precision < 0.5
