"""Networks of Hugging Face diffusers."""

import torch
from torch import Tensor, nn

from .client import Client

LATENTS = (2, 4, 8, 8)


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
    ).eval()  # fmt: skip


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, norm_num_groups=2,
    )  # fmt: skip


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip


def _unet_with_text() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=4, out_channels=4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip


def _checkpointed(network: nn.Module) -> nn.Module:
    network.enable_gradient_checkpointing()
    return network


def _plain(network: nn.Module) -> None:
    network.disable_gradient_checkpointing()


def _text(x: Tensor, *shape: int) -> Tensor:
    """Embeddings of a text, the same at each call."""
    return (
        torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=x.dtype)
        .view(1, *shape)
        .sin()
        .repeat(len(x), *(1,) * len(shape))
    )


def _time(t: Tensor, r: Tensor) -> Tensor:
    return 10 * t + 3 * r


def _call_dit(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    labels = torch.tensor([1, 2])
    return network(x * (1 + r.view(-1, 1, 1, 1)), timestep=_time(t, r), class_labels=labels).sample


def _call_sd3(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(x, _text(x, 5, 12), _text(x, 12), _time(t, r)).sample


def _call_flux(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)).to(x.dtype)
    tokens = x.flatten(2).transpose(1, 2)[:, :16]
    return network(
        hidden_states=tokens, encoder_hidden_states=_text(x, 5, 12), pooled_projections=_text(x, 12),
        timestep=_time(t, r) / 10, img_ids=ids, txt_ids=torch.zeros(5, 3, dtype=x.dtype),
    ).sample  # fmt: skip


def _call_pixart(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    mask = torch.ones(2, 5)
    mask[0, 3:] = 0
    added = {"resolution": None, "aspect_ratio": None}
    return network(
        x, encoder_hidden_states=_text(x, 5, 12), timestep=_time(t, r), encoder_attention_mask=mask,
        added_cond_kwargs=added,
    ).sample  # fmt: skip


def _call_unet(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(x, _time(t, r)).sample


def _call_unet_with_text(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(x, _time(t, r), _text(x, 5, 12)).sample


def _call_vae(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(x * (1 + t * r).view(-1, 1, 1, 1)).sample


NAME = "diffusers"
CLIENTS = [
    Client("diffusers DiT", NAME, _dit, _call_dit, LATENTS),
    Client(
        "diffusers DiT, checkpointed", NAME, lambda: _checkpointed(_dit()), _call_dit, LATENTS, checkpoints=True,
        plain=_plain,
    ),
    Client("diffusers Stable Diffusion 3", NAME, _sd3, _call_sd3, LATENTS),
    Client("diffusers Flux", NAME, _flux, _call_flux, LATENTS),
    Client(
        "diffusers Flux, checkpointed", NAME, lambda: _checkpointed(_flux()), _call_flux, LATENTS, checkpoints=True,
        plain=_plain,
    ),
    Client("diffusers PixArt", NAME, _pixart, _call_pixart, LATENTS),
    Client("diffusers UNet2D", NAME, _unet, _call_unet, LATENTS),
    Client(
        "diffusers UNet2D, checkpointed", NAME, lambda: _checkpointed(_unet()), _call_unet, LATENTS, checkpoints=True,
        plain=_plain,
    ),
    Client("diffusers UNet2DCondition", NAME, _unet_with_text, _call_unet_with_text, LATENTS),
    Client("diffusers AutoencoderKL", NAME, _vae, _call_vae, LATENTS),
]  # fmt: skip
