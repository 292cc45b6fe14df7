"""The diffusion transformer of Terminal Velocity Matching, written once for plain and for dual evaluation.

Peebles & Xie, arXiv 2212.09748, with the changes of Zhou et al., arXiv 2511.19797: RMSNorm without parameters in
place of LayerNorm, an RMSNorm on q and k, modulation vectors that are RMS-normalised, a second time input t - s,
beta = 1/w as a third embedding, and spectral initialisation. Each of the first three is a switch of `DiTConfig`.
"""

import math
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor, nn

from . import dual
from .dual import Dual
from .initialise import STD, normal, position_embedding, spectral, zero

Maybe = Tensor | None
Tangents = tuple[Maybe, Maybe, Maybe]

EPS = 1e-6
FREQUENCIES = 128  # each gives a cosine and a sine
MAX_PERIOD = 10000.0
MAX_HEAD_DIM = 256
ATTENTION_BACKENDS = (None, "triton", "tiled", "reference")

SIZES: dict[str, dict[str, int]] = {
    "S/2": {"width": 384, "depth": 12, "heads": 6, "patch": 2},
    "B/2": {"width": 768, "depth": 12, "heads": 12, "patch": 2},
    "L/2": {"width": 1024, "depth": 24, "heads": 16, "patch": 2},
    "XL/2": {"width": 1152, "depth": 28, "heads": 16, "patch": 2},
    "XL/2-18h": {"width": 1152, "depth": 28, "heads": 18, "patch": 2},
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """What the network is made of.

    Raises:
        ValueError: for a combination that is no network.
    """

    image_size: int  # height and width of the images, in pixels (or latent pixels)
    channels: int  # of the images: 1 grey, 3 RGB, 4 latents, 2 points
    patch: int = 2  # edge of a patch, in pixels
    width: int  # of the tokens
    depth: int  # number of blocks
    heads: int  # of attention; each is width / heads wide
    num_classes: int = 0  # labels are less; 0: unconditional, without a label embedding
    guidance: bool = True  # whether beta = 1/w is an input
    mlp_ratio: float = 4.0  # width of the hidden layer of a block's MLP over `width`
    norm: Literal["rms", "layer"] = "rms"  # of the tokens: RMSNorm, or the LayerNorm of a plain DiT
    qk_norm: bool = True  # whether queries and keys get an RMSNorm over the head dim
    modulation_norm: bool = True  # whether the modulation vectors are RMS-normalised
    spectral_time_mlp: bool = False  # initialisation of the embedders' MLPs: spectral, or N(0, 0.02)
    attention_backend: Literal["triton", "tiled", "reference"] | None = None  # None: the fastest that can run

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch", "width", "depth", "heads"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(
            self.image_size % self.patch == 0, "image_size", f"a multiple of patch = {self.patch}", self.image_size
        )
        _require(self.width % self.heads == 0, "width", f"a multiple of heads = {self.heads}", self.width)
        _require(self.width % 4 == 0, "width", "a multiple of 4 (a sine and a cosine for each axis)", self.width)
        _require(self.head_dim <= MAX_HEAD_DIM, "width / heads", f"at most {MAX_HEAD_DIM}", self.head_dim)
        _require(self.num_classes >= 0, "num_classes", "at least 0", self.num_classes)
        _require(self.hidden >= 1, "mlp_ratio", "a hidden layer of at least one unit", self.mlp_ratio)
        backend = self.attention_backend
        _require(backend in ATTENTION_BACKENDS, "attention_backend", f"one of {ATTENTION_BACKENDS}", backend)
        _require(self.norm in ("rms", "layer"), "norm", "'rms' or 'layer'", self.norm)

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """The width of the hidden layer of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one edge of the image."""
        return self.image_size // self.patch


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


class DiT(nn.Module):
    """The network F(x, t, s, label, beta), whose displacement from t to s is (s - t) F (scaled form: (s - t) w F).

    Attributes are named like the published weights; the state dict of a class-conditional network with guidance has
    exactly their names and shapes.
    """

    def __init__(self, config: DiTConfig) -> None:
        """Initialised from torch's global random state, on its default device and in its default dtype: F = 0."""
        super().__init__()
        self.config = config
        self.pos_embed = nn.Parameter(position_embedding(config.grid, config.width), requires_grad=False)
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = ScalarEmbedder(config)
        self.s_embedder = ScalarEmbedder(config)
        if config.guidance:
            self.guidance_embedder = ScalarEmbedder(config)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor,
        beta: Maybe = None,
        tangents: Tangents | None = None,
        detach: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """F, or with tangents (F, F_t), F_t the derivative of F along (x_t, t_t, s_t), block by block.

        Args:
            x: images [B, channels, image_size, image_size], of the dtype of the parameters (float32 or float64).
            t, s: times [B] in [0, 1], any float type; t = 1 is noise. The network sees t and t - s.
            labels: int64 [B] in [0, num_classes]; num_classes = no class. An unconditional network does not look.
            beta: 1/w [B], w the guidance scale without unit; None for a network without guidance input.
            tangents: (x_t, t_t, s_t), shaped like x, t and s; None for one that is zero, which costs nothing.
            detach: True gives an F_t through which no gradient flows, which saves memory and most of the backward pass.

        Returns:
            F [B, channels, image_size, image_size] of x's dtype, in units of the velocity; with tangents also F_t.

        Derivatives: reverse mode through F and F_t together, to parameters, x, x_t and times; forward mode
        (`torch.func.jvp`) of the call without tangents, followed by reverse mode.

        Numerics: under autocast, products and attention are in its dtype, norms, embeddings, the residual stream and F
        in float32. Sinusoids are computed in float64.

        Raises: ValueError for shapes or dtypes that do not fit, a beta that is missing or not taken.
        """
        self._check(x, t, s, labels, beta, tangents)
        x_t, t_t, s_t = tangents or (None, None, None)
        with torch.autocast(x.device.type, enabled=False):
            tokens = self.x_embedder(Dual(x, x_t))
            tokens = Dual(tokens.value + self.pos_embed, tokens.tangent)
            condition = self._condition(t, s, labels, beta, t_t, s_t)
        for block in self.blocks:
            tokens = _as_dual(block(tokens.value, condition.value, tokens.tangent, condition.tangent, detach))
        F, F_t = self.final_layer(tokens, condition)
        F = self._image(F, x.dtype)
        if tangents is None:
            return F
        F_t = torch.zeros_like(F) if F_t is None else self._image(F_t, x.dtype)
        return F, F_t.detach() if detach else F_t

    def _condition(self, t: Tensor, s: Tensor, labels: Tensor, beta: Maybe, t_t: Maybe, s_t: Maybe) -> Dual:
        """The sum of all embeddings but that of the image, [B, width]."""
        gap = t.double() - s.double()
        gap_t = dual.total(t_t, None if s_t is None else -s_t)
        condition = dual.add(self.t_embedder(t, t_t), self.s_embedder(gap, gap_t))
        if beta is not None:
            condition = dual.add(condition, self.guidance_embedder(beta))
        if self.config.num_classes:
            condition = dual.add(condition, self.y_embedder(labels))
        return condition

    def _image(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        """The image [B, C, H, W] of patches [B, tokens, (row in patch, column in patch, channel)]."""
        p, grid = self.config.patch, self.config.grid
        patches = patches.to(dtype).unflatten(-1, (p, p, -1)).unflatten(1, (grid, grid))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor, beta: Maybe, tangents: Tangents | None) -> None:
        config = self.config
        shape = (len(x), config.channels, config.image_size, config.image_size)
        _require(x.shape == shape, "x", f"shape {shape}", tuple(x.shape))
        _require(x.dtype == self.pos_embed.dtype, "x", f"the parameters' {self.pos_embed.dtype}", x.dtype)
        _require(labels.dtype == torch.int64, "labels", "torch.int64", labels.dtype)
        _require((beta is not None) == config.guidance, "beta", f"{'[B]' if config.guidance else 'None'}", beta)
        vectors = {"t": t, "s": s, "labels": labels, "beta": beta}
        if tangents is not None:
            _require(len(tangents) == 3, "tangents", "(x_t, t_t, s_t)", f"{len(tangents)} elements")
            x_t, vectors["t_t"], vectors["s_t"] = tangents
            _require(x_t is None or x_t.shape == x.shape, "x_t", f"shape {shape}", x_t if x_t is None else x_t.shape)
        for name, vector in vectors.items():
            if vector is not None:
                _require(vector.shape == (len(x),), name, f"shape ({len(x)},)", tuple(vector.shape))


class PatchEmbedder(nn.Module):
    """Patches of x [B, C, H, W] through one linear layer: tokens [B, (H / patch) (W / patch), width], row by row."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.proj = spectral(nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch))

    def forward(self, x: Dual) -> Dual:
        """The tokens, with a tangent if x has one."""
        return dual.linear(x.map(self._patches), self.proj.weight.flatten(1), self.proj.bias)

    def _patches(self, x: Tensor) -> Tensor:
        p = self.patch
        rows = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B, C, H / p, p, W / p, p]
        return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class ScalarEmbedder(nn.Module):
    """MLP(sinusoids(scalar)) for scalars [B]: [B, width]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        start = spectral if config.spectral_time_mlp else normal
        first, second = nn.Linear(2 * FREQUENCIES, config.width), nn.Linear(config.width, config.width)
        self.mlp = nn.Sequential(start(first), nn.SiLU(), start(second))

    def forward(self, scalar: Tensor, tangent: Maybe = None) -> Dual:
        """The embedding, with a tangent if the scalar has one."""
        first, second = _linear(self.mlp, 0), _linear(self.mlp, 2)
        exponents = torch.arange(FREQUENCIES, dtype=torch.float64, device=scalar.device) / FREQUENCIES
        waves = dual.sinusoids(scalar, tangent, torch.exp(-math.log(MAX_PERIOD) * exponents))
        waves = waves.map(lambda part: part.to(first.weight.dtype))
        return dual.linear(dual.silu(dual.linear(waves, first.weight, first.bias)), second.weight, second.bias)


class LabelEmbedder(nn.Module):
    """A learned vector for each label; row num_classes stands for "no class"."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.width)
        nn.init.normal_(self.embedding_table.weight, std=STD)

    def forward(self, labels: Tensor) -> Dual:
        """The vectors [B, width] of labels [B]; they have no tangent."""
        return Dual(self.embedding_table(labels))


class DiTBlock(nn.Module):
    """x + gate * attention(modulated norm(x)), then the same with an MLP; (shift, scale, gate) twice from c."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.adaLN_modulation = modulation(config, 6)
        self.modulation_norm = config.modulation_norm

    def forward(
        self, x: Tensor, c: Tensor, x_t: Maybe = None, c_t: Maybe = None, detach: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens x [B, N, width] and condition c [B, width] to x; with a tangent x_t or c_t to (x, x_t).

        An ordinary differentiable function of tensors. `detach`: no gradient flows through the tangent.
        """
        tokens = Dual(x, x_t)
        vectors = modulation_vectors(Dual(c, c_t), _linear(self.adaLN_modulation, 1), 6, self.modulation_norm)
        for branch, (shift, scale, gate) in zip((self.attn, self.mlp), (vectors[:3], vectors[3:]), strict=True):
            inner = dual.modulate(_norm(tokens, self.norm), shift, scale)
            tokens = dual.gated_residual(tokens, gate, branch(inner, detach))
        if tokens.tangent is None:
            return tokens.value
        return tokens.value, tokens.tangent.detach() if detach else tokens.tangent


class Attention(nn.Module):
    """Multi-head self-attention; rows of qkv are ordered (q, k, v), each (head, dim)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.attention_backend
        self.qkv = spectral(nn.Linear(config.width, 3 * config.width))
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.proj = spectral(nn.Linear(config.width, config.width))

    def forward(self, x: Dual, detach: bool) -> Dual:
        """Tokens [B, N, width] to tokens; `detach`: no gradient flows through the tangent."""
        qkv = dual.linear(x, self.qkv.weight, self.qkv.bias).map(self._split)
        q, k, v = (qkv.map(itemgetter(i)) for i in range(3))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, v.value.dtype), self.k_norm(k, v.value.dtype)
        if detach:
            q, k, v = q.detach_tangent(), k.detach_tangent(), v.detach_tangent()
        heads = dual.attention(q, k, v, backend=self.backend)
        tokens = heads.map(lambda part: part.transpose(1, 2).flatten(2))
        return dual.linear(tokens, self.proj.weight, self.proj.bias)

    def _split(self, qkv: Tensor) -> Tensor:
        """[3, B, heads, N, head_dim], a view of [B, N, 3 width]."""
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class HeadNorm(nn.Module):
    """RMSNorm over the last dim with a learned weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Dual, dtype: torch.dtype) -> Dual:
        """The norm, computed in float32 at least and returned in `dtype`."""
        return dual.rms_norm(x, self.weight, eps=EPS).map(lambda part: part.to(dtype))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = spectral(nn.Linear(config.width, config.hidden))
        self.fc2 = spectral(nn.Linear(config.hidden, config.width))

    def forward(self, x: Dual, detach: bool) -> Dual:
        """Tokens [B, N, width] to tokens; takes `detach` only to be called like `Attention`."""
        hidden = dual.gelu(dual.linear(x, self.fc1.weight, self.fc1.bias))
        return dual.linear(hidden, self.fc2.weight, self.fc2.bias)


class FinalLayer(nn.Module):
    """linear(modulated norm(x)): tokens [B, N, width] to patches [B, N, patch * patch * channels]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.linear = zero(nn.Linear(config.width, config.patch**2 * config.channels))
        self.adaLN_modulation = modulation(config, 2)
        self.modulation_norm = config.modulation_norm

    def forward(self, x: Dual, c: Dual) -> Dual:
        """The patches, with a tangent if x or c has one."""
        shift, scale = modulation_vectors(c, _linear(self.adaLN_modulation, 1), 2, self.modulation_norm)
        return dual.linear(dual.modulate(_norm(x, self.norm), shift, scale), self.linear.weight, self.linear.bias)


def modulation(config: DiTConfig, vectors: int) -> nn.Sequential:
    """The layers that give `vectors` modulation vectors of a condition [B, width]."""
    return nn.Sequential(nn.SiLU(), zero(nn.Linear(config.width, vectors * config.width)))


def modulation_vectors(c: Dual, layer: nn.Linear, count: int, normalise: bool) -> list[Dual]:
    """`count` vectors [B, 1, width] = layer(silu(c)) of a condition [B, width], each RMS-normalised if `normalise`."""
    packed = dual.linear(dual.silu(c), layer.weight, layer.bias)
    stacked = packed.map(lambda part: part.unflatten(-1, (count, 1, -1)))
    if normalise:
        stacked = dual.rms_norm(stacked, eps=EPS)
    return [stacked.map(partial(torch.select, dim=1, index=i)) for i in range(count)]


def _norm(x: Dual, kind: Literal["rms", "layer"]) -> Dual:
    return dual.rms_norm(x, eps=EPS) if kind == "rms" else dual.layer_norm(x, eps=EPS)


def _linear(layers: nn.Sequential, index: int) -> nn.Linear:
    layer = layers[index]
    assert isinstance(layer, nn.Linear)
    return layer


def _as_dual(output: Tensor | tuple[Tensor, Tensor]) -> Dual:
    return Dual(output) if isinstance(output, Tensor) else Dual(*output)
