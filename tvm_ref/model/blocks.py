"""Blocks of the diffusion transformer: attention and MLP with modulation, and the output layer."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import dual
from .config import DiTConfig
from .dual import Dual, Linear, Maybe
from .fused import stream
from .fused.heads import normalised_heads, split_heads
from .fused.stream import Modulation
from .initialise import spectral, zero

if TYPE_CHECKING:
    from flashjvp.distributed import Sharding

EPS = 1e-6


class DiTBlock(nn.Module):
    """A transformer block with adaLN modulation: x + gate * attention(modulate(norm(x))), then the same with an MLP.

    The condition c gives (shift, scale, gate) for each of the two branches.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.adaLN_modulation = modulation(config, 6)
        self.modulation_eps = config.modulation_eps if config.modulation_norm else None

    def forward(
        self, x: Tensor, c: Tensor, x_t: Maybe = None, c_t: Maybe = None, detach: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps tokens x [B, N, width] and condition c [B, width] to tokens x; given x_t or c_t, to (x, x_t).

        Inputs and outputs are plain tensors, so that a block can be compiled, checkpointed and sharded on its own.
        detach: no gradient flows through the tangent.
        """
        tokens = Dual(x, x_t)
        vectors = modulation_vectors(Dual(c, c_t), self.adaLN_modulation, 6, self.modulation_eps)
        for_attention, gate_of_attention = Modulation(*vectors[:2]), vectors[2]
        for_mlp, gate_of_mlp = Modulation(*vectors[3:5]), vectors[5]
        tokens, inner = stream.modulated(tokens, for_attention, self.norm, eps=EPS, detach=detach)
        branch = self.attn(inner, detach)
        tokens, inner = stream.added_and_modulated(
            tokens, gate_of_attention, branch, for_mlp, self.norm, eps=EPS, detach=detach
        )
        tokens = stream.added(tokens, gate_of_mlp, self.mlp(inner, detach), detach=detach)
        if tokens.tangent is None:
            return tokens.value
        return tokens.value, tokens.tangent.detach() if detach else tokens.tangent


class Attention(nn.Module):
    """Multi-head self-attention. The rows of the qkv weight are ordered (q, k, v), each as (head, dim)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.attention_backend
        self.sharding: Sharding | None = None  # how tokens are divided over processes
        self.product: Linear = F.linear
        self.qkv = spectral(nn.Linear(config.width, 3 * config.width))
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.proj = spectral(nn.Linear(config.width, config.width))

    def forward(self, x: Dual, detach: bool) -> Dual:
        """Maps tokens [B, N, width] to tokens. detach: no gradient flows through the tangent."""
        qkv = dual.linear(x, self.qkv.weight, self.qkv.bias, self.product)
        if self.q_norm is None or self.k_norm is None:
            q, k, v = split_heads(qkv, self.heads)
        else:
            weights = self.q_norm.weight, self.k_norm.weight
            q, k, v = normalised_heads(qkv, self.heads, *weights, eps=EPS, detach=detach)
        if detach:
            q, k, v = q.detach_tangent(), k.detach_tangent(), v.detach_tangent()
        heads = dual.attention(q, k, v, backend=self.backend, sharding=self.sharding)
        tokens = heads.map(lambda part: part.transpose(1, 2).flatten(2))
        return dual.linear(tokens, self.proj.weight, self.proj.bias, self.product)


class HeadNorm(nn.Module):
    """The learned weight of an RMSNorm over the head dim; `normalised_heads` computes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Mlp(nn.Module):
    """The MLP of a block, fc2(gelu(fc1(x)))."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = spectral(nn.Linear(config.width, config.hidden))
        self.fc2 = spectral(nn.Linear(config.hidden, config.width))
        self.product: Linear = F.linear

    def forward(self, x: Dual, detach: bool) -> Dual:
        """Maps tokens [B, N, width] to tokens. `detach` has no effect here; `DiTBlock` passes it to both branches."""
        hidden = dual.gelu(dual.linear(x, self.fc1.weight, self.fc1.bias, self.product))
        return dual.linear(hidden, self.fc2.weight, self.fc2.bias, self.product)


class FinalLayer(nn.Module):
    """The output layer, linear(modulate(norm(x))): tokens [B, N, width] to patches [B, N, patch * patch * channels]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.linear = zero(nn.Linear(config.width, config.patch**2 * config.channels))
        self.adaLN_modulation = modulation(config, 2)
        self.modulation_eps = config.modulation_eps if config.modulation_norm else None

    def forward(self, x: Dual, c: Dual, detach: bool) -> Dual:
        """Returns the patches, with a tangent if x or c has one. detach: no gradient flows through the tangent."""
        shift, scale = modulation_vectors(c, self.adaLN_modulation, 2, self.modulation_eps)
        _, inner = stream.modulated(x, Modulation(shift, scale), self.norm, eps=EPS, detach=detach)
        return dual.linear(inner, self.linear.weight, self.linear.bias)


def modulation(config: DiTConfig, vectors: int) -> nn.Sequential:
    """Layers that map a condition [B, width] to `vectors` modulation vectors."""
    return nn.Sequential(nn.SiLU(), zero(nn.Linear(config.width, vectors * config.width)))


def modulation_vectors(c: Dual, layers: nn.Sequential, count: int, eps: float | None) -> list[Dual]:
    """Maps a condition [B, width] to `count` vectors [B, 1, width], each RMS-normalised with `eps` if it is given."""
    layer = layers[1]
    assert isinstance(layer, nn.Linear)
    packed = dual.linear(dual.silu(c), layer.weight, layer.bias)
    stacked = packed.map(lambda part: part.unflatten(-1, (count, 1, -1)))
    if eps is not None:
        stacked = dual.rms_norm(stacked, eps=eps)
    return [stacked.map(partial(torch.select, dim=1, index=i)) for i in range(count)]
