"""What the causal biases of `torch.nn.attention.bias` mean: objects that look like tensors and hold no numbers.

That module is imported only for a mask that may be one: it imports torch._dynamo, which takes more than a second.
"""

from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentValueError


def is_causal_bias(mask: object) -> bool:
    """Whether a mask that is no plain tensor is a causal bias."""
    from torch.nn.attention.bias import CausalBias

    return isinstance(mask, CausalBias)


def meaning(bias: Any, q: object, k: object) -> tuple[Tensor | None, bool]:
    """The mask (None where `is_causal` says it all) and `is_causal` that stand for a bias."""
    from torch.nn.attention.bias import CausalVariant

    rows, columns = bias.seq_len_q, bias.seq_len_kv
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.ndim < 2 or k.ndim < 2:
        return None, True  # which the checks of the call refuse
    if (q.shape[-2], k.shape[-2]) != (rows, columns):
        raise ArgumentValueError(
            f"attn_mask: expected a causal bias of {q.shape[-2]} queries and {k.shape[-2]} keys, got one of {rows} and "
            f"{columns}"
        )
    if bias.variant == CausalVariant.UPPER_LEFT or rows == columns:  # mutate: if bias variant
        return None, True
    # mutate: return torch ones
    return torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows), False
