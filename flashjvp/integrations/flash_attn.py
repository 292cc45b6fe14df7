"""What stands for the functions of flash_attn: tensors [B, M, H, D], or packed sequences [total, H, D]."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import packed
from .active import present
from .packages import Package
from .sdpa import served, unsupported

Function = Callable[..., Any]
# What is understood, or changes no result. Any other argument has to have its default value.
_KNOWN = {
    "q", "k", "v", "kv", "qkv", "dropout_p", "softmax_scale", "causal", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k",
    "max_seqlen", "max_seqlen_q", "max_seqlen_k", "deterministic", "num_splits", "pack_gqa", "sm_margin",
}  # fmt: skip
_NAMES = (
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
)  # fmt: skip


def _standing_for(name: str, stock: Function) -> Function:
    """A function with the arguments of `stock`, whose order differs between releases of flash_attn."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def function(*args: Any, **kwargs: Any) -> Any:
        context = present()
        if context is None:
            return stock(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        q, k, v = _qkv(given)
        if context.leaves_alone((q, k, v)):
            context.report_of.add(name, "PyTorch", "no tangent")
            return stock(*args, **kwargs)
        for argument, value in given.items():
            if argument not in _KNOWN and value != signature.parameters[argument].default:
                raise unsupported(context, name, f"{argument}={value!r}")

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            causal, mask = given.get("causal", False), None
            if causal:  # aligned at the bottom right
                mask = packed.bottom_right(q, k)
                causal = mask is None
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            rest = (mask, given.get("dropout_p", 0.0), causal, given.get("softmax_scale"), q.shape[1] != k.shape[1])
            return served(context, name, q, k, v, *rest).transpose(1, 2)

        if "varlen" not in name:
            return attention(q, k, v)
        of_q = given["cu_seqlens" if "cu_seqlens" in given else "cu_seqlens_q"]
        of_k = of_q if "cu_seqlens" in given else given["cu_seqlens_k"]
        if given.get("dropout_p", 0.0) == 0.0:
            rest = (given.get("causal", False), given.get("softmax_scale"))
            o = packed.by_varlen(context, name, q, k, v, of_q, of_k, *rest)
            if o is not None:
                return o
        return packed.by_lengths(q, k, v, of_q.tolist(), of_k.tolist(), attention)

    return function


def _qkv(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    if "qkv" in given:
        return given["qkv"].unbind(-3)
    if "kv" in given:
        return given["q"], *given["kv"].unbind(-3)
    return given["q"], given["k"], given["v"]


PACKAGE = Package(
    ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface"),  # of releases 2 and 3
    {name: functools.partial(_standing_for, name) for name in _NAMES},
)
