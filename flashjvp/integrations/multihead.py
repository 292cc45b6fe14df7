"""What stands for `F.multi_head_attention_forward`, the function of nn.MultiheadAttention, and for its fast path.

With `need_weights` (the default) PyTorch computes the output from dense weights. Here the output comes from attention,
and the weights, which most callers drop, beside it: no backward pass through the output needs them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _torch
from .active import present
from .sdpa import ANY_WANTED, WANTED

NAME = "multi_head_attention_forward"
STOCK = F.multi_head_attention_forward
STOCK_FAST_PATH = torch.backends.mha.get_fastpath_enabled


def multi_head_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Any,
    in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Any,
    out_proj_bias: Any, training: bool = True, key_padding_mask: Any = None, need_weights: bool = True,
    attn_mask: Any = None, use_separate_proj_weight: bool = False, q_proj_weight: Any = None, k_proj_weight: Any = None,
    v_proj_weight: Any = None, static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """PyTorch's function, which without weights calls scaled_dot_product_attention."""

    def stock(need_weights: bool, is_causal: bool) -> tuple[Tensor, Tensor | None]:
        return STOCK(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
            add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights,
            attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v,
            average_attn_weights, is_causal,
        )  # fmt: skip

    context = present()
    if context is None or not need_weights:
        return stock(need_weights, is_causal)
    if context.leaves_alone((query, key, value, attn_mask)):
        context.report_of.add(NAME, "PyTorch", "no tangent")
        return stock(need_weights, is_causal)
    if (training and dropout_p > 0) or torch.compiler.is_compiling():
        context.report_of.add(NAME, "dense equations", "need_weights=True with dropout or under torch.compile")
        return stock(need_weights, is_causal)
    context.report_of.add(NAME, "flashjvp", "weights computed beside the output, dense")
    before, WANTED.weights = WANTED.weights, []
    ANY_WANTED.append(None)
    try:
        # Without the hint, which takes the place of the mask where no weights are needed.
        o, _ = stock(need_weights=False, is_causal=False)
        (p,) = WANTED.weights
    finally:
        WANTED.weights = before
        ANY_WANTED.pop()
    if average_attn_weights:
        p = p.mean(dim=1)
    return o, p if query.dim() == 3 else p.squeeze(0)


def get_fastpath_enabled() -> bool:
    """PyTorch's switch. The fast path is one kernel for a whole layer, which forward mode does not know."""
    context = present()
    if context is None or (context.when == "jvp" and not _torch.may_carry_tangents()):
        return STOCK_FAST_PATH()
    return False
