"""The network as a model of diffusers, for its from_pretrained and save_pretrained. Needs the extra `latents`.

No class of diffusers fits: DiTTransformer2DModel has one time input for our three (t, t - s, 1/w), an embedding of it
in every block for our one, and no norm of queries, keys and modulation.
"""

import dataclasses
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .model.dit import DiT, DiTConfig
from .objective.loss import LossConfig


class TVMTransformer2DModel(ModelMixin, ConfigMixin):
    """A `DiT` together with what sampling must know of its training: w, and whether its output is scaled by w.

    The model gives the average velocity u between two times, so that a jump from t to s <= t is

        x_s = x_t + (s - t) u(x_t, t, s, label, w),   u = w F (scaled) or F,   t = 1 is noise.

    Settings are those of `DiTConfig`, but for spectral_time_mlp, which concerns initial weights alone: those are zero
    here. scaled and w are as in `LossConfig`; w = None after training with random guidance.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        patch: int = 2,
        num_classes: int = 0,
        guidance: bool = True,
        mlp_ratio: float = 4.0,
        norm: Literal["rms", "layer"] = "rms",
        qk_norm: bool = True,
        modulation_norm: bool = True,
        modulation_eps: float = 1e-6,
        attention_backend: Literal["triton", "tiled", "reference"] | None = None,
        scaled: bool = True,
        w: float | None = None,
    ) -> None:
        super().__init__()
        settings = DiTConfig(
            image_size=image_size, channels=channels, width=width, depth=depth, heads=heads, patch=patch,
            num_classes=num_classes, guidance=guidance, mlp_ratio=mlp_ratio, norm=norm, qk_norm=qk_norm,
            modulation_norm=modulation_norm, modulation_eps=modulation_eps, attention_backend=attention_backend,
        )  # fmt: skip
        with torch.device("meta"):
            self.dit = DiT(settings)
        # Not the initial weights of training: from_pretrained turns off the functions that draw those.
        for module in self.dit.modules():
            for name, weight in tuple(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.zeros(weight.shape), requires_grad=weight.requires_grad))

    @classmethod
    def of(cls, network: DiT, loss: LossConfig) -> "TVMTransformer2DModel":
        """Makes the model of a trained network, with the same tensors."""
        settings = dataclasses.asdict(network.config)
        del settings["spectral_time_mlp"]
        with torch.device("meta"):
            model = cls(**settings, scaled=loss.scaled, w=None if loss.w_random else loss.w)
        model.dit = network
        return model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        end_timestep: Tensor | float,
        class_labels: Tensor | None = None,
        w: float | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Computes u for images `sample` [B, C, H, W], float32.

        Args:
            timestep, end_timestep: t and s in [0, 1], one number, or [B].
            class_labels: int64 [B]; None: no class.
            w: guidance scale; None: that of training.
            return_dict: an output object with the field `sample`, or else a tuple.

        Raises: ValueError if training had random guidance and w is None, and as `DiT.forward`.
        """
        config: Any = self.config
        w = config.w if w is None else w
        if w is None:
            raise ValueError("w: expected a guidance scale, since training had a random one, got None")
        t, s, guidance = (
            torch.as_tensor(value, dtype=sample.dtype, device=sample.device).expand(len(sample))
            for value in (timestep, end_timestep, w)
        )
        if class_labels is None:
            class_labels = torch.full((len(sample),), config.num_classes, device=sample.device)
        F = self.dit(sample, t, s, class_labels, 1 / guidance if config.guidance else None)
        u = w * F if config.scaled else F
        return Transformer2DModelOutput(sample=u) if return_dict else (u,)
