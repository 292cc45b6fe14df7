"""Features by a vision transformer from a safetensors file, and files that are none."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tvm_ref.quality.vit import PIXELS, VitFeatures, VitFileError
from verify.budget.metric_tolerance import single_precision_bound

CPU = torch.device("cpu")
WIDTH, PATCH, DEPTH = 64, 56, 2


def weights(side: int = PIXELS // PATCH, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Random weights of a small network whose position embeddings are for side x side patches."""
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) / max(shape[-1], 2) ** 0.5

    found = {
        "cls_token": made(1, 1, width), "pos_embed": made(1, 1 + side**2, width), "mask_token": made(1, width),
        "patch_embed.proj.weight": made(width, 3, PATCH, PATCH), "patch_embed.proj.bias": made(width),
        "norm.weight": made(width), "norm.bias": made(width),
    }  # fmt: skip
    for i in range(DEPTH):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            found[f"blocks.{i}.{name}"] = made(width)
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (99, width)}
        for name, (rows, columns) in (layers | {"mlp.fc2": (width, 99)}).items():
            found |= {f"blocks.{i}.{name}.weight": made(rows, columns), f"blocks.{i}.{name}.bias": made(rows)}
    return found


def expected(found: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The class token, one image and one head after the other, in float64."""
    w = {name: x.double() for name, x in found.items()}
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rows = []
    for image in images.double() / 255:
        big = F.interpolate(image[None], size=(224, 224), mode="bicubic", antialias=True)[0]
        big = (big - mean[:, None, None]) / deviation[:, None, None]
        patches = [
            torch.einsum("dcij,cij->d", w["patch_embed.proj.weight"], big[:, y : y + PATCH, x : x + PATCH])
            for y in range(0, 224, PATCH) for x in range(0, 224, PATCH)
        ]  # fmt: skip
        tokens = torch.stack([w["cls_token"][0, 0], *(patch + w["patch_embed.proj.bias"] for patch in patches)])
        x = tokens + w["pos_embed"][0]
        for i in range(DEPTH):
            b = f"blocks.{i}."
            y = norm(x, w, f"{b}norm1") @ w[f"{b}attn.qkv.weight"].T + w[f"{b}attn.qkv.bias"]
            q, k, v = y.split(WIDTH, dim=1)
            heads = [slice(h, h + 64) for h in range(0, WIDTH, 64)]
            o = torch.cat([(q[:, h] @ k[:, h].T / 8).softmax(1) @ v[:, h] for h in heads], dim=1)
            x = x + w[f"{b}ls1.gamma"] * (o @ w[f"{b}attn.proj.weight"].T + w[f"{b}attn.proj.bias"])
            y = norm(x, w, f"{b}norm2") @ w[f"{b}mlp.fc1.weight"].T + w[f"{b}mlp.fc1.bias"]
            y = y * (1 + torch.erf(y / 2**0.5)) / 2
            x = x + w[f"{b}ls2.gamma"] * (y @ w[f"{b}mlp.fc2.weight"].T + w[f"{b}mlp.fc2.bias"])
        rows.append(norm(x[:1], w, "norm")[0])
    return torch.stack(rows)


def norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def test_features_are_the_class_token(tmp_path: Path) -> None:
    found = weights()
    save_file(found, tmp_path / "vit.safetensors")
    images = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)
    features = VitFeatures(tmp_path / "vit.safetensors", CPU).features(images)
    assert features.dtype == torch.float32 and features.shape == (3, WIDTH)
    exact = expected(found, images)
    # A patch is a sum of 3 * 56^2 products; the two blocks add little to its roundings.
    bound = single_precision_bound(roundings=3 * PATCH**2, scale=float(exact.abs().max()))
    assert float((features - exact).abs().max()) <= bound


def test_half_precision_weights_and_other_grids_are_taken(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    halves = {name: x.half() for name, x in weights().items()}
    save_file(halves, tmp_path / "half.safetensors")
    save_file({name: x.float() for name, x in halves.items()}, tmp_path / "single.safetensors")
    half, single = (VitFeatures(tmp_path / f"{n}.safetensors", CPU).features(images) for n in ("half", "single"))
    assert torch.equal(half, single)
    for side in (3, 9):  # constant embeddings stay constant at any size
        found = weights(side)
        found["pos_embed"][:, 1:] = 0.25
        save_file(found, tmp_path / "other.safetensors")
        same = weights()
        same["pos_embed"] = torch.cat([found["pos_embed"][:, :1], torch.full((1, 16, WIDTH), 0.25)], 1)
        for name in found.keys() - {"pos_embed"}:
            same[name] = found[name]
        save_file(same, tmp_path / "same.safetensors")
        one, two = (VitFeatures(tmp_path / f"{n}.safetensors", CPU).features(images) for n in ("other", "same"))
        assert float((one - two).abs().max()) <= single_precision_bound(1000, float(two.abs().max()))


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no feature network at .*hf download .* --features FILE"):
        VitFeatures(path, CPU)
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(VitFileError, match=r"expected safetensors .* may run code"):
        VitFeatures(path, CPU)
    whole = weights()
    bad = whole["norm.bias"].clone()
    bad[3] = torch.nan
    for changed, message in (
        ({**whole, "reg_token": torch.zeros(1, 4, WIDTH)}, "reg_token: expected no such weight"),
        ({**whole, "norm.bias": bad}, r"norm\.bias: expected finite"),
        ({**whole, "norm.bias": torch.zeros(WIDTH, dtype=torch.int64)}, r"norm\.bias: expected finite"),
        ({**whole, "blocks.1.mlp.fc1.bias": torch.zeros(98)}, r"fc1\.bias: expected \[99\], got \[98\]"),
        ({**whole, "pos_embed": torch.zeros(1, 16, WIDTH)}, r"pos_embed: expected \[1, 17, 64\]"),
        ({**whole, "cls_token": torch.zeros(1, 1, 50)}, "expected"),
        ({**whole, "cls_token": torch.zeros(())}, "expected"),
        ({n: x for n, x in whole.items() if n != "pos_embed"}, "it has no pos_embed"),
        ({n: x for n, x in whole.items() if n != "blocks.1.ls1.gamma"}, r"ls1\.gamma: expected \[64\], got none"),
    ):
        save_file(changed, path)
        with pytest.raises(VitFileError, match=message):
            VitFeatures(path, CPU)
    save_file(whole, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(VitFileError, match="expected safetensors"):
        VitFeatures(path, CPU)
    save_file(whole, path)
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            VitFeatures(path, CPU).features(images)
