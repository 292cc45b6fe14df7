"""Network settings: the published sizes and tensors, and the settings that are refused."""

from typing import Any

import pytest
import torch

from tvm_ref.model.config import SIZES, DiTConfig
from tvm_ref.model.dit import DiT
from verify.oracles.network import tiny


def test_the_largest_network_has_the_published_tensors() -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(image_size=32, channels=4, num_classes=1000, **SIZES["XL/2-18h"]))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    width, hidden = 1152, 4608
    expected: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 256, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (16, width),
        "final_layer.linear.bias": (16,),
    }
    layers = {"final_layer.adaLN_modulation.1": (2 * width, width)}
    for name in ("s_embedder", "t_embedder", "guidance_embedder"):
        layers |= {f"{name}.mlp.0": (width, 256), f"{name}.mlp.2": (width, width)}
    for i in range(28):
        block = f"blocks.{i}"
        expected |= {f"{block}.attn.q_norm.weight": (64,), f"{block}.attn.k_norm.weight": (64,)}
        layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        layers |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
        layers |= {f"{block}.adaLN_modulation.1": (6 * width, width)}
    for name, shape in layers.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert shapes == expected
    assert len(shapes) == 356
    assert round(sum(tensor.numel() for tensor in network.parameters()) / 1e6) == 678


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_a_network(size: str) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(image_size=16, channels=4, **SIZES[size]))
    assert len(network.blocks) == SIZES[size]["depth"]
    assert network.config.head_dim == (72 if size == "XL/2" else 64)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 25}, "width"),
        ({"width": 30, "heads": 5}, "width"),
        ({"image_size": 7}, "image_size"),
        ({"depth": 0}, "depth"),
        ({"num_classes": -1}, "num_classes"),
        ({"width": 1028, "heads": 4}, "width / heads"),
        ({"norm": "batch"}, "norm"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"modulation_eps": 0.0}, "modulation_eps"),
        ({"attention_backend": "fast"}, "attention_backend"),
    ],
)
def test_a_configuration_that_is_no_network_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        tiny(**changes)
