"""Networks of x-transformers and denoising-diffusion-pytorch, which write attention out unless told otherwise."""

import functools

import torch
from torch import Tensor, nn

from .client import Client, timed


def _encoder(flash: bool) -> nn.Module:
    from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, attn_flash=flash)
    return ContinuousTransformerWrapper(dim_in=16, dim_out=16, max_seq_len=8, attn_layers=layers)


def _unet(flash: bool) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(8, dim_mults=(1, 2), channels=4, attn_dim_head=8, attn_heads=2, flash_attn=flash)


def _of_times(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(timed(x, t, r))


def _call_unet(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(x * (1 + r.view(-1, 1, 1, 1)), t)


def _plain(network: nn.Module) -> None:
    """Their flash attention chooses PyTorch's backend by itself, and so not the equations."""
    for module in network.modules():
        if hasattr(module, "flash"):
            module.flash = False
            module.attn_fn = functools.partial(torch.softmax, dim=-1)  # theirs is in float32


TOKENS, IMAGE = (2, 6, 16), (2, 4, 8, 8)
OWN = "attention by einsum"
CLIENTS = [
    Client("x-transformers, attn_flash", "x_transformers", lambda: _encoder(True), _of_times, TOKENS, plain=_plain),
    Client("x-transformers", "x_transformers", lambda: _encoder(False), _of_times, TOKENS, "own equations", OWN),
    Client(
        "denoising-diffusion-pytorch, flash_attn", "denoising_diffusion_pytorch", lambda: _unet(True), _call_unet,
        IMAGE, why="linear attention has equations of its own", plain=_plain,
    ),
    Client(
        "denoising-diffusion-pytorch", "denoising_diffusion_pytorch", lambda: _unet(False), _call_unet, IMAGE,
        "own equations", OWN,
    ),
]  # fmt: skip
