"""Blocks of the diffusion transformer: attention and MLP with modulation, and the output layer."""

from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from . import dual
from .config import DiTConfig
from .dual import Dual, Maybe
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
        for branch, (shift, scale, gate) in zip((self.attn, self.mlp), (vectors[:3], vectors[3:]), strict=True):
            inner = dual.modulate(_norm(tokens, self.norm), shift, scale)
            tokens = dual.gated_residual(tokens, gate, branch(inner, detach))
        if tokens.tangent is None:
            return tokens.value
        return tokens.value, tokens.tangent.detach() if detach else tokens.tangent


class Attention(nn.Module):
    """Multi-head self-attention. The rows of the qkv weight are ordered (q, k, v), each as (head, dim)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.attention_backend
        self.sharding: Sharding | None = None  # how tokens are divided over processes
        self.qkv = spectral(nn.Linear(config.width, 3 * config.width))
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.proj = spectral(nn.Linear(config.width, config.width))

    def forward(self, x: Dual, detach: bool) -> Dual:
        """Maps tokens [B, N, width] to tokens. detach: no gradient flows through the tangent."""
        qkv = dual.linear(x, self.qkv.weight, self.qkv.bias).map(self._split)
        q, k, v = (qkv.map(itemgetter(i)) for i in range(3))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, v.value.dtype), self.k_norm(k, v.value.dtype)
        if detach:
            q, k, v = q.detach_tangent(), k.detach_tangent(), v.detach_tangent()
        heads = dual.attention(q, k, v, backend=self.backend, sharding=self.sharding)
        tokens = heads.map(lambda part: part.transpose(1, 2).flatten(2))
        return dual.linear(tokens, self.proj.weight, self.proj.bias)

    def _split(self, qkv: Tensor) -> Tensor:
        """Views [B, N, 3 width] as [3, B, heads, N, head_dim]."""
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class HeadNorm(nn.Module):
    """RMSNorm over the head dim, with a learned weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Dual, dtype: torch.dtype) -> Dual:
        """Normalises x in float32 or wider, and returns the result in `dtype`."""
        return dual.rms_norm(x, self.weight, eps=EPS).map(lambda part: part.to(dtype))


class Mlp(nn.Module):
    """The MLP of a block, fc2(gelu(fc1(x)))."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = spectral(nn.Linear(config.width, config.hidden))
        self.fc2 = spectral(nn.Linear(config.hidden, config.width))

    def forward(self, x: Dual, detach: bool) -> Dual:
        """Maps tokens [B, N, width] to tokens. `detach` has no effect here; `DiTBlock` passes it to both branches."""
        hidden = dual.gelu(dual.linear(x, self.fc1.weight, self.fc1.bias))
        return dual.linear(hidden, self.fc2.weight, self.fc2.bias)


class FinalLayer(nn.Module):
    """The output layer, linear(modulate(norm(x))): tokens [B, N, width] to patches [B, N, patch * patch * channels]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.linear = zero(nn.Linear(config.width, config.patch**2 * config.channels))
        self.adaLN_modulation = modulation(config, 2)
        self.modulation_eps = config.modulation_eps if config.modulation_norm else None

    def forward(self, x: Dual, c: Dual) -> Dual:
        """Returns the patches, with a tangent if x or c has one."""
        shift, scale = modulation_vectors(c, self.adaLN_modulation, 2, self.modulation_eps)
        return dual.linear(dual.modulate(_norm(x, self.norm), shift, scale), self.linear.weight, self.linear.bias)


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


def _norm(x: Dual, kind: Literal["rms", "layer"]) -> Dual:
    return dual.rms_norm(x, eps=EPS) if kind == "rms" else dual.layer_norm(x, eps=EPS)
