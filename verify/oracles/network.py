"""A dense network written from the formulas alone: the oracle for the network of tvm_ref.

It takes the weights as a dictionary under their published names, uses nothing of tvm_ref but the configuration, and
leaves every derivative to torch.func and autograd.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_ref.model.dit import DiT, DiTConfig

Weights = dict[str, Tensor]


def tiny(**changes: object) -> DiTConfig:
    """A small network with every feature; `changes` replace fields."""
    fields = {"image_size": 6, "channels": 3, "patch": 2, "width": 24, "depth": 2, "heads": 2, "num_classes": 5}
    return DiTConfig(**{**fields, "attention_backend": "reference", **changes})  # type: ignore[arg-type]


def trained(config: DiTConfig, seed: int, dtype: torch.dtype = torch.float64) -> DiT:
    """A network whose every weight is random: at initialisation modulation and output are zero and hide mistakes.

    Weights have variance 1 / (4 fan-in), lest attention saturate and a few roundings rule the error.
    """
    network = DiT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "table" not in name else 1
            parameter.data = torch.randn(parameter.shape, generator=generator) / (2 * fan_in**0.5)
    return network.to(dtype)


def weights_of(network: DiT, dtype: torch.dtype | None = None) -> Weights:
    """The parameters by name (the same tensors, or copies of another type)."""
    return {name: p if dtype is None else p.detach().to(dtype) for name, p in network.named_parameters()}


def network(
    p: Weights, config: DiTConfig, x: Tensor, t: Tensor, s: Tensor, labels: Tensor, beta: Tensor | None
) -> Tensor:
    """F(x, t, s, label, beta)."""
    c = embed(p, "t_embedder", t) + embed(p, "s_embedder", t - s)
    if beta is not None:
        c = c + embed(p, "guidance_embedder", beta)
    if config.num_classes:
        c = c + p["y_embedder.embedding_table.weight"][labels]
    patches = F.unfold(x, config.patch, stride=config.patch).transpose(1, 2)  # a convolution may round to TF32
    h = F.linear(patches, p["x_embedder.proj.weight"].flatten(1), p["x_embedder.proj.bias"]) + p["pos_embed"]
    for i in range(config.depth):
        h = block(p, f"blocks.{i}", config, h, c)
    m = modulation(p, "final_layer", config, c, 2)
    out = affine(p, "final_layer.linear", norm(config, h) * (1 + m[1]) + m[0])
    columns = out.unflatten(-1, (config.patch**2, config.channels)).permute(0, 3, 2, 1).flatten(1, 2)
    return F.fold(columns.to(x.dtype), (config.image_size,) * 2, config.patch, stride=config.patch)


def block(p: Weights, name: str, config: DiTConfig, h: Tensor, c: Tensor) -> Tensor:
    """Tokens h [B, N, width] after block `name` under condition c [B, width]."""
    m = modulation(p, name, config, c, 6)
    h = h + m[2] * attention(p, name + ".attn", config, norm(config, h) * (1 + m[1]) + m[0])
    return h + m[5] * mlp(p, name + ".mlp", norm(config, h) * (1 + m[4]) + m[3])


def affine(p: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return F.linear(x, p[name + ".weight"], p[name + ".bias"])


def embed(p: Weights, name: str, scalar: Tensor) -> Tensor:
    """The MLP of 128 cosines and 128 sines."""
    frequencies = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)], dtype=torch.float64)
    phase = torch.outer(scalar.double(), frequencies.to(scalar.device))
    waves = torch.cat([phase.cos(), phase.sin()], dim=1).to(p[name + ".mlp.0.weight"].dtype)
    with torch.autocast(scalar.device.type, enabled=False):
        hidden = affine(p, name + ".mlp.0", waves)
        return affine(p, name + ".mlp.2", hidden / (1 + torch.exp(-hidden)))


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its root mean square."""
    x = x if x.dtype == torch.float64 else x.float()
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def norm(config: DiTConfig, x: Tensor) -> Tensor:
    """RMSNorm or LayerNorm without parameters."""
    return rms(x) if config.norm == "rms" else rms(x - x.mean(-1, keepdim=True))


def modulation(p: Weights, name: str, config: DiTConfig, c: Tensor, count: int) -> list[Tensor]:
    """`count` vectors [B, 1, width]."""
    vectors = affine(p, name + ".adaLN_modulation.1", c * torch.sigmoid(c)).chunk(count, dim=-1)
    return [(rms(vector, config.modulation_eps) if config.modulation_norm else vector)[:, None] for vector in vectors]


def attention(p: Weights, name: str, config: DiTConfig, x: Tensor) -> Tensor:
    """Multi-head attention, head by head, with an explicit softmax."""
    q, k, v = affine(p, name + ".qkv", x).chunk(3, dim=-1)
    heads = []
    for q_, k_, v_ in zip(q.chunk(config.heads, -1), k.chunk(config.heads, -1), v.chunk(config.heads, -1), strict=True):
        if config.qk_norm:
            q_, k_ = (rms(z) * p[f"{name}.{which}_norm.weight"] for z, which in ((q_, "q"), (k_, "k")))
        scores = q_.to(v.dtype) @ k_.to(v.dtype).transpose(1, 2) / math.sqrt(config.width // config.heads)
        heads.append(torch.softmax(scores, -1) @ v_)
    return affine(p, name + ".proj", torch.cat(heads, -1))


def mlp(p: Weights, name: str, x: Tensor) -> Tensor:
    """Two layers with the tanh form of GELU between."""
    h = affine(p, name + ".fc1", x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return affine(p, name + ".fc2", h)
