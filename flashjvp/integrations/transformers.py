"""flashjvp as an attention implementation of Hugging Face transformers: the attention function and its masks."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..api import attention
from ..errors import ArgumentTypeError, ArgumentValueError, UnsupportedError

# What a model may ask of an attention function beside masks, and the value that asks for nothing.
_NOT_SERVED = {
    "softcap": "softcapped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a mask of heads",
    "indices": "keys chosen by index",
    "block_indices": "blocks of keys chosen by index",
    "output_attentions": "attention weights as a result",
}
# transformers looks for these words in the name of an implementation, and then treats it as its own of that kind.
_WORDS_WITH_A_MEANING = ("flash", "flex_attention", "sdpa", "eager", "|", "/", ":")


def register(name: str = "fused_jvp") -> str:
    """Registers flashjvp with transformers: `model.set_attn_implementation(name)` then serves a model by it.

    The attention function is registered together with the function that makes its masks. Without the latter there are
    none, and padding is ignored. Registering twice is harmless.

    Args:
        name: what `attn_implementation` is to say. It must not contain "flash": transformers takes such a name for a
            kernel of FlashAttention, which it looks for on the Hub, and for which it makes other masks. So the default
            is not the name of this library.

    Returns:
        The name.

    Derivatives:
        Those of `flashjvp.attention`, which serves the calls: padding on either side, grouped-query attention, caches
        of another length than the queries, sliding windows and biases of positions, which come in as masks.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ArgumentTypeError: a name that is not a string.
        ArgumentValueError: a name that transformers gives a meaning of its own, or that belongs to another function.
        UnsupportedError: a release of transformers without these interfaces. Later, in the forward pass of a model:
            softcapped scores, attention sinks, packed sequences or a window without a mask, `output_attentions`, and
            whatever `flashjvp.attention` refuses.

    Source:
        AttentionInterface and AttentionMaskInterface of transformers; tried with releases 4.57 and 5.24.
    """
    transformers = import_module("transformers")
    _check_name(name)
    try:
        functions, masks = transformers.AttentionInterface, transformers.AttentionMaskInterface
        mask_function = masks()["sdpa"]  # boolean, True = take part; None where is_causal says it all
    except (AttributeError, KeyError) as error:
        came = getattr(transformers, "__version__", "an unknown release")
        expected = "a release with AttentionInterface and AttentionMaskInterface (4.57 to 5.24 were tried)"
        raise UnsupportedError(f"transformers: expected {expected}, got {came}") from error
    registered = functions()
    if name in registered and registered[name] is not attention_forward:
        raise ArgumentValueError(f"name: expected one that is free, got {name!r}, which transformers knows already")
    functions.register(name, attention_forward)
    masks.register(name, mask_function)
    return name


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, called as transformers calls it.

    Args:
        module: the layer, whose `is_causal` (True where it has none) counts if that argument is None.
        query: [B, Hq, M, D].
        key: [B, Hkv, N, D], where Hkv divides Hq.
        value: [B, Hkv, N, Dv].
        attention_mask: bool or additive, broadcasts to [B, Hq, M, N]. It says all: a causal layer with a mask has its
            causality in there. None = every key, or for a causal layer with more than one query, those up to it.
        dropout: a probability.
        scaling: the scale of the scores; None = D**-0.5.
        is_causal: see `attention_mask`.
        position_bias: added to the scores, broadcasts to [B, Hq, M, N].
        asked: what else a model passes on. What would change the result is refused.

    Returns:
        o [B, M, Hq, Dv], contiguous, and None for the weights, which are never held.

    Raises:
        UnsupportedError: see `register`.
    """
    _check_asked(asked, attention_mask, key.shape[-2])
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[-2] > 1
    if position_bias is not None:
        attention_mask = _with_bias(position_bias, attention_mask)
    groups = query.shape[-3] != key.shape[-3]
    o = attention(query, key, value, attention_mask, dropout, causal, scaling, groups)
    return o.transpose(-2, -3).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """The bias where the mask lets a key take part. Elsewhere a finite number, as transformers has it."""
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _check_asked(asked: dict[str, Any], mask: Tensor | None, keys: int) -> None:
    for argument, meaning in _NOT_SERVED.items():
        if asked.get(argument) is not None and asked[argument] is not False:
            expected = f"nothing ({meaning}: not implemented; attn_implementation='eager' has it)"
            raise UnsupportedError(f"{argument}: expected {expected}, got {_described(asked[argument])}")
    if mask is not None:
        return
    window = asked.get("sliding_window")
    if window is not None and window < keys:
        raise UnsupportedError(f"sliding_window: expected a mask that has the window, got {window} and no mask")
    if asked.get("cu_seq_lens_q") is not None:
        raise UnsupportedError("cu_seq_lens_q: expected a mask that keeps packed sequences apart, got none")


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ArgumentTypeError(f"name: expected a string, got an object of type {type(name).__name__}")
    found = [word for word in _WORDS_WITH_A_MEANING if word in name]
    if not name or found:
        words = ", ".join(map(repr, _WORDS_WITH_A_MEANING))
        raise ArgumentValueError(f"name: expected one without {words}, which transformers reads, got {name!r}")


def _described(x: object) -> str:
    return f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
