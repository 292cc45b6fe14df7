"""Inception features for FID, precision and recall, by the Inception network of StyleGAN from a local file."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

DETECTOR_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


class DetectorError(ValueError):
    """The file is not the Inception network."""


class InceptionDetector:
    """The Inception network that StyleGAN3, EDM2 and TVM report FID with: 2048 features for each image.

    path: inception-2015-12-05.pt, a TorchScript file, which cannot run Python code. Raises FileNotFoundError that says
    what to download, and DetectorError for a file that is not a TorchScript module.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no Inception weights at {path}: fetch {DETECTOR_URL} and pass --inception FILE")
        try:
            self._detector = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise DetectorError(f"{path} is no TorchScript file; expected {DETECTOR_URL} ({error})") from error
        self._path, self._device = path, device

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Computes features float32 [n, d], on the CPU, of images uint8 [n, 3, H, W], resized to 299 x 299 inside."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}")
        try:
            features = self._detector(images.to(self._device), return_features=True)
        except RuntimeError as error:
            raise DetectorError(f"{self._path} does not run as the Inception detector: {error}") from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            raise DetectorError(f"{self._path} gave no features [n, d]; expected {DETECTOR_URL}")
        return features.float().cpu()

    def all_features(self, batches: Iterable[Tensor]) -> Tensor:
        """Computes the features of all batches, concatenated."""
        return torch.cat([self.features(images) for images in batches])
