"""Networks of timm."""

from torch import Tensor, nn

from .client import Client, timed

IMAGE = (2, 3, 16, 16)


def _vit(**options: object) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**sizes | options)


def _vit_switched_off() -> nn.Module:
    network = _vit()
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return network


def _checkpointed() -> nn.Module:
    network = _vit()
    network.set_grad_checkpointing()
    return network


def _plain(network: nn.Module) -> None:
    network.set_grad_checkpointing(False)


def _swin(**options: object) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return SwinTransformer(**sizes, num_classes=0, drop_path_rate=0.0)


def _swin_v2() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(
        img_size=16, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=0,
        drop_path_rate=0.0,
    )  # fmt: skip


def _beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, init_values=0.5,
        use_abs_pos_emb=False, use_rel_pos_bias=True,
    )  # fmt: skip


def _eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, use_rot_pos_emb=True,
        swiglu_mlp=True,
    )  # fmt: skip


def _deit() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )  # fmt: skip


def _cait() -> nn.Module:
    from timm.models.cait import Cait

    return Cait(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0, init_values=0.5)


def features(network: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return network.forward_features(timed(x, t, r))


CLIENTS = [
    Client("timm ViT", "timm", _vit, features, IMAGE),
    Client("timm ViT, fused_attn off", "timm", _vit_switched_off, features, IMAGE),
    Client("timm ViT, norms of q and k", "timm", lambda: _vit(qk_norm=True), features, IMAGE),
    Client("timm ViT, checkpointed", "timm", _checkpointed, features, IMAGE, checkpoints=True, plain=_plain),
    Client("timm DeiT, distilled", "timm", _deit, features, IMAGE),
    Client("timm EVA", "timm", _eva, features, IMAGE),
    Client("timm BEiT", "timm", _beit, features, IMAGE),
    Client("timm Swin", "timm", _swin, features, IMAGE),
    Client("timm Swin V2", "timm", _swin_v2, features, IMAGE, "own equations", "cosine attention"),
    Client("timm CaiT", "timm", _cait, features, IMAGE, "own equations", "talking heads"),
]
