"""The diffusion transformer of Terminal Velocity Matching. One forward pass gives the output, or output and JVP.

The architecture is that of Peebles & Xie, arXiv 2212.09748, with the changes of Zhou et al., arXiv 2511.19797:

- RMSNorm without parameters in place of LayerNorm, RMSNorm on q and k, and RMS-normalised modulation vectors; each of
  these three is a switch of `DiTConfig`
- t - s as a second time input, and beta = 1/w as a third embedding
- spectral initialisation
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import dual
from .blocks import Attention, DiTBlock, FinalLayer, Mlp
from .config import DiTConfig, require
from .dual import Dual, Linear, Maybe
from .embeddings import LabelEmbedder, PatchEmbedder, ScalarEmbedder
from .initialise import position_embedding

if TYPE_CHECKING:
    from flashjvp.distributed import Sharding

__all__ = ["DiT", "DiTConfig"]

Tangents = tuple[Maybe, Maybe, Maybe]


class DiT(nn.Module):
    """The network F(x, t, s, label, beta), whose displacement from t to s is (s - t) F (scaled form: (s - t) w F).

    Attributes have the names of the published weights. The state dict of a class-conditional network with guidance has
    exactly the published names and shapes.
    """

    def __init__(self, config: DiTConfig) -> None:
        """Initialises the weights so that F = 0, from torch's global random state, on its default device and dtype."""
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
        self.watch: Callable[[int, Dual], None] | None = None  # is given the number and the output of every block
        self.sharding: Sharding | None = None
        self._residual: torch.dtype | None = None

    def share_tokens(self, sharding: "Sharding") -> None:
        """From now on each process computes its own tokens of an image, and all of them the same F and F_t.

        Gradients of the parameters are then those of its tokens, for the sum of all processes' losses.
        """
        self.sharding = sharding
        for module in self.blocks.modules():
            if isinstance(module, Attention):
                module.sharding = sharding

    def multiply_with(self, product: Linear) -> None:
        """From now on the linear layers of attention and MLPs are computed by `product`, in place of `F.linear`."""
        for module in self.blocks.modules():
            if isinstance(module, Attention | Mlp):
                module.product = product

    def keep_residual_in(self, dtype: torch.dtype) -> None:
        """From now on the tokens between branches, and their tangents, are rounded to this type."""
        self._residual = dtype

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
        """Computes F; given tangents, computes (F, F_t), where F_t is the derivative of F along (x_t, t_t, s_t).

        Args:
            x: images [B, channels, image_size, image_size], in the dtype of the parameters (float32 or float64).
            t, s: times [B] in [0, 1], any float dtype; t = 1 is noise. The network sees t and t - s.
            labels: int64 [B] in [0, num_classes]; num_classes means no class. Unconditional networks ignore them.
            beta: 1/w [B], with w the guidance scale; None for a network without guidance input.
            tangents: (x_t, t_t, s_t), shaped like x, t and s. None in place of one means zero, and costs nothing.
            detach: no gradient flows through F_t. This saves memory and most of the backward pass.

        Returns:
            F [B, channels, image_size, image_size] in x's dtype, in units of the velocity; with tangents also F_t.

        Derivatives: reverse mode through F and F_t together, to parameters, x, x_t and times. Without tangents, also
        forward mode (`torch.func.jvp`) followed by reverse mode.

        Numerics: under autocast, matrix products and attention use its dtype; norms, embeddings, the residual stream
        and F are float32; `keep_residual_in` rounds the stream. Sinusoids are computed in float64.

        Raises: ValueError for shapes or dtypes that do not match, and for a beta that is missing or not expected.
        """
        self._check(x, t, s, labels, beta, tangents)
        x_t, t_t, s_t = tangents or (None, None, None)
        with torch.autocast(x.device.type, enabled=False):
            tokens = self.x_embedder(Dual(x, x_t))
            tokens = Dual(tokens.value + self.pos_embed, tokens.tangent)
            condition = self._condition(t, s, labels, beta, t_t, s_t)
        if (residual := self._residual) is not None:
            tokens = tokens.map(lambda part: part.to(residual))
        if (sharding := self.sharding) is not None:
            tokens = tokens.map(lambda part: sharding.shard(part, 1))
        for number, block in enumerate(self.blocks):
            tokens = _as_dual(block(tokens.value, condition.value, tokens.tangent, condition.tangent, detach))
            if self.watch is not None:
                self.watch(number, tokens)
        output = self.final_layer(tokens, condition, detach)
        F, F_t = output if sharding is None else output.map(lambda part: sharding.unshard(part, 1))
        F = self._image(F, x.dtype)
        if tangents is None:
            return F
        F_t = torch.zeros_like(F) if F_t is None else self._image(F_t, x.dtype)
        return F, F_t.detach() if detach else F_t

    def _condition(self, t: Tensor, s: Tensor, labels: Tensor, beta: Maybe, t_t: Maybe, s_t: Maybe) -> Dual:
        """The sum of the embeddings of times, guidance and labels, [B, width]."""
        gap = t.double() - s.double()
        gap_t = dual.total(t_t, None if s_t is None else -s_t)
        condition = dual.add(self.t_embedder(t, t_t), self.s_embedder(gap, gap_t))
        if beta is not None:
            condition = dual.add(condition, self.guidance_embedder(beta))
        if self.config.num_classes:
            condition = dual.add(condition, self.y_embedder(labels))
        return condition

    def _image(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        """Assembles patches [B, tokens, (row in patch, column in patch, channel)] into images [B, C, H, W]."""
        p, grid = self.config.patch, self.config.grid
        patches = patches.to(dtype).unflatten(-1, (p, p, -1)).unflatten(1, (grid, grid))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor, beta: Maybe, tangents: Tangents | None) -> None:
        config = self.config
        shape = (len(x), config.channels, config.image_size, config.image_size)
        require(x.shape == shape, "x", f"shape {shape}", tuple(x.shape))
        require(x.dtype == self.pos_embed.dtype, "x", f"the parameters' {self.pos_embed.dtype}", x.dtype)
        require(labels.dtype == torch.int64, "labels", "torch.int64", labels.dtype)
        require((beta is not None) == config.guidance, "beta", f"{'[B]' if config.guidance else 'None'}", beta)
        vectors = {"t": t, "s": s, "labels": labels, "beta": beta}
        if tangents is not None:
            require(len(tangents) == 3, "tangents", "(x_t, t_t, s_t)", f"{len(tangents)} elements")
            x_t, vectors["t_t"], vectors["s_t"] = tangents
            require(x_t is None or x_t.shape == x.shape, "x_t", f"shape {shape}", x_t if x_t is None else x_t.shape)
        for name, vector in vectors.items():
            if vector is not None:
                require(vector.shape == (len(x),), name, f"shape ({len(x)},)", tuple(vector.shape))


def _as_dual(output: Tensor | tuple[Tensor, Tensor]) -> Dual:
    return Dual(output) if isinstance(output, Tensor) else Dual(*output)
