"""Knows the switches by which modules of PyTorch, timm, diffusers and transformers choose written-out attention."""

from torch import nn

# Attributes that are False where a module writes attention out: timm's, and that of denoising-diffusion-pytorch.
_FLAGS = ("fused_attn", "flash")


def to_turn(model: nn.Module, path: str) -> str | None:
    """What to do so that the module at `path` calls scaled_dot_product_attention; None if it has no switch we know."""
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        return "call it with need_weights=False"
    for flag in _FLAGS:
        if getattr(module, flag, None) is False:
            return f"set {flag} = True"
    if type(getattr(module, "processor", None)).__name__ == "AttnProcessor":
        return "set_attn_processor(AttnProcessor2_0())"
    if any(_is_eager(model.get_submodule(above)) for above in _and_above(path)):
        return "model.set_attn_implementation('sdpa')"
    return None


def _is_eager(module: nn.Module) -> bool:
    """Of transformers: its models choose attention by their configuration."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager"


def _and_above(path: str) -> list[str]:
    names = path.split(".") if path else []
    return [".".join(names[:length]) for length in range(len(names), -1, -1)]
