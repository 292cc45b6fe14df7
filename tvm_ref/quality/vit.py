"""Features of images by a vision transformer of the DINOv2 family, from a safetensors file, which runs no code."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data.safetensors_header import read_header

PIXELS = 224  # height and width that images are resized to
HEAD_DIM = 64  # of every network of the family
EPS = 1e-6
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
OFFSET = 0.1  # added to the grid size where position embeddings are resized, as DINOv2's networks are used
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
EXAMPLE = "hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors"


class VitFileError(ValueError):
    """The file holds no vision transformer of this family. The message names the file."""


class VitFeatures:
    """A vision transformer with layer scale, as DINOv2 has it, and the class token after its last norm as features.

    path: a safetensors file with the names that DINOv2 and timm give the weights (`cls_token`, `pos_embed`,
    `blocks.0.attn.qkv.weight` and so on), without register tokens. Weights of any type are used in float32.

    Raises FileNotFoundError that says what to download, and VitFileError for anything else than such a file.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no feature network at {path}: {EXAMPLE}, for example, and pass --features FILE")
        try:
            shapes = {name: x["shape"] for name, x in read_header(path).items() if name != "__metadata__"}
        except ValueError as error:
            raise VitFileError(f"{path}: expected safetensors ({error}); other files may run code") from error
        shapes.pop("mask_token", None)  # for training only
        if missing := [name for name in NEEDED if name not in shapes]:
            raise VitFileError(f"{path}: expected a vision transformer as of {EXAMPLE}; it has no {missing[0]}")
        self.depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        expected = _shapes(shapes, self.depth)
        if differing := sorted(
            name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)
        ):
            name = differing[0]
            raise VitFileError(
                f"{path}: {name}: expected {expected.get(name, 'no such weight')}, got {shapes.get(name, 'none')}; it "
                f"is no vision transformer as of {EXAMPLE}"
            )
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise VitFileError(f"{path}: {error}") from error
        for name in expected:
            if not weights[name].is_floating_point() or not weights[name].isfinite().all():
                raise VitFileError(f"{path}: {name}: expected finite floating-point numbers, got others")
        self._weights = {name: weights[name].to(device, torch.float32) for name in expected}
        self._device, self._patch = device, shapes["patch_embed.proj.weight"][-1]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Computes features float32 [n, d], on the CPU, of images uint8 [n, 3, H, W].

        Images are resized to 224 x 224 (bicubic, antialiased, in float32), then normalised.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}")
        x = F.interpolate(
            images.to(self._device, torch.float32) / 255, size=(PIXELS, PIXELS), mode="bicubic", antialias=True
        )
        mean, deviation = (x.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        weight, bias = (self._weights[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
        x = F.conv2d((x - mean) / deviation, weight, bias, stride=weight.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self._weights["cls_token"].expand(len(x), 1, -1), x], dim=1) + self._positions()
        for i in range(self.depth):
            x = x + self._attention(self._norm(x, f"blocks.{i}.norm1"), f"blocks.{i}")
            hidden = F.gelu(F.linear(self._norm(x, f"blocks.{i}.norm2"), **self._linear(f"blocks.{i}.mlp.fc1")))
            x = x + F.linear(hidden, **self._linear(f"blocks.{i}.mlp.fc2")) * self._weights[f"blocks.{i}.ls2.gamma"]
        return self._norm(x[:, 0], "norm").cpu()

    def _attention(self, x: Tensor, block: str) -> Tensor:
        qkv = F.linear(x, **self._linear(f"{block}.attn.qkv")).unflatten(2, (3, -1, HEAD_DIM))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(o, **self._linear(f"{block}.attn.proj")) * self._weights[f"{block}.ls1.gamma"]

    def _positions(self) -> Tensor:
        """The position embeddings for this grid of patches, [1, 1 + patches, d]."""
        whole, size = self._weights["pos_embed"], PIXELS // self._patch
        stored = round((whole.shape[1] - 1) ** 0.5)
        if stored == size:
            return whole
        square = whole[:, 1:].transpose(1, 2).unflatten(2, (stored, stored))
        resized = F.interpolate(square, scale_factor=(size + OFFSET) / stored, mode="bicubic")
        return torch.cat([whole[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def _linear(self, name: str) -> dict[str, Tensor]:
        return {part: self._weights[f"{name}.{part}"] for part in ("weight", "bias")}

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], **self._linear(name), eps=EPS)


def _shapes(found: dict[str, list[int]], depth: int) -> dict[str, list[int]]:
    """The weights of a vision transformer that agrees with some of `found`, with their shapes."""
    token, positions, patches, hidden = (found[name] for name in NEEDED)
    d, patch, h = token[-1] if token else 0, patches[-1] if patches else 0, hidden[0] if hidden else 0
    if not (d and d % HEAD_DIM == 0 and patch and PIXELS % patch == 0 and len(positions) == 3):
        return {name: [] for name in NEEDED}
    side = round(max(positions[1] - 1, 0) ** 0.5)
    shapes = {
        "cls_token": [1, 1, d], "pos_embed": [1, 1 + side**2, d], "patch_embed.proj.weight": [d, 3, patch, patch],
        "patch_embed.proj.bias": [d], "norm.weight": [d], "norm.bias": [d],
    }  # fmt: skip
    layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (h, d), "mlp.fc2": (d, h)}
    for i in range(depth):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = [d]
        for name, (rows, columns) in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": [rows, columns], f"blocks.{i}.{name}.bias": [rows]}
    return shapes
