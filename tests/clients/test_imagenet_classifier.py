"""The network of tvm_ref's classifier of ImageNet is timm's, with the same weights in the same order."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tvm_ref.quality.random_classifier import random_weights
from tvm_ref.quality.imagenet_classifier import DEVIATION, MEAN, ImageNetClassifier

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.clients


@pytest.mark.parametrize("pixels", [224, 28])
def test_features_and_logits_are_timms(pixels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, weights = tmp_path / "random.pth", random_weights()
    torch.save(weights, path)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    own = model.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    given = [x for name, x in weights.items() if not name.endswith("num_batches_tracked")]
    model.load_state_dict({**own, **dict(zip(names, given, strict=True))})
    images = torch.randint(256, (2, 3, pixels, pixels), dtype=torch.uint8)
    network = ImageNetClassifier(path, torch.device("cpu"))
    x = (F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) - MEAN) / DEVIATION

    def of_timm(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = model.forward_features(x)
            return model.forward_head(features, pre_logits=True), model.forward_head(features)

    found = network.features(images), network.logits(images)
    rounded = of_timm(x)
    model.double()
    for ours, theirs, exact in zip(found, rounded, of_timm(x.double()), strict=True):
        error = (ours - exact).abs().max()
        assert error <= 4 * (theirs - exact).abs().max()  # that of timm's float32
        assert error < (exact[0] - exact[1]).abs().max() / 1000
