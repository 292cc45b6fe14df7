"""Networks of PyTorch itself and of torchvision."""

import torch
from torch import Tensor, nn

from .client import Client, timed

TOKENS = (2, 6, 16)


class _SelfAttention(nn.Module):
    """nn.MultiheadAttention as most callers have it."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.options = nn.LayerNorm(16), options

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, **self.options)[0]


class _Padded(nn.Module):
    """The same with padding, which PyTorch takes as True = left out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding[0, -2:] = True
        return x + self.attention(x, x, x, key_padding_mask=padding)[0]


class _Decoder(nn.Module):
    """nn.TransformerDecoder, causal, with a memory of another length."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype)
        return self.decoder(x[:, :4], x[:, 3:] * 0.5, tgt_mask=causal, tgt_is_causal=True)


class _Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x[:, :3], x[:, 3:])


def _encoder(**options: object) -> nn.Module:
    sizes = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True} | options
    layer = nn.TransformerEncoderLayer(16, 2, 32, **sizes)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=8)


def _torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], 16, [2], [2], [4, 4], stochastic_depth_prob=0.0, num_classes=8)


def _of_times(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network(timed(x, t, r))


IMAGE = (2, 3, 16, 16)
CLIENTS = [
    Client("nn.MultiheadAttention", "torch", _SelfAttention, _of_times, TOKENS),
    Client(
        "nn.MultiheadAttention, need_weights=False", "torch", lambda: _SelfAttention(need_weights=False), _of_times,
        TOKENS,
    ),
    Client("nn.MultiheadAttention, padded", "torch", _Padded, _of_times, TOKENS),
    Client("nn.TransformerEncoder", "torch", _encoder, _of_times, TOKENS),
    Client("nn.TransformerEncoder, eval", "torch", lambda: _encoder(norm_first=False).eval(), _of_times, TOKENS),
    Client("nn.TransformerDecoder", "torch", _Decoder, _of_times, TOKENS),
    Client("nn.Transformer", "torch", _Whole, _of_times, TOKENS),
    Client("torchvision ViT", "torchvision", _torchvision_vit, _of_times, IMAGE),
    Client(
        "torchvision Swin", "torchvision", _torchvision_swin, _of_times, IMAGE, "own equations",
        "attention of windows written out",
    ),
]  # fmt: skip
