"""What stands for `xformers.ops.memory_efficient_attention`, and for `unbind`, which has no forward mode there.

Tensors are [B, M, H, D], or [B, M, D] for one head. Biases are told by the names of their classes, which are xformers'.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import packed
from .active import present
from .packages import Package
from .sdpa import served, unsupported

Function = Callable[..., Any]
NAME = "memory_efficient_attention"


def _attention(stock: Function) -> Function:
    @functools.wraps(stock)
    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None,
        *, op: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        context = present()
        if context is None:
            return stock(query, key, value, attn_bias, p, scale, op=op, **options)
        if context.leaves_alone((query, key, value, attn_bias)):
            context.report_of.add(NAME, "PyTorch", "no tangent")
            return stock(query, key, value, attn_bias, p, scale, op=op, **options)
        if any(value is not None for value in options.values()):
            raise unsupported(context, NAME, ", ".join(options))
        if query.ndim not in (3, 4):
            raise unsupported(context, NAME, f"a query of shape {list(query.shape)}")
        kind = "" if attn_bias is None or isinstance(attn_bias, Tensor) else type(attn_bias).__name__
        if kind not in _CAUSAL and kind not in _PACKED and kind != "":
            raise unsupported(context, NAME, f"an attn_bias of class {kind}")

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask, causal = (attn_bias, False) if kind == "" else (None, kind in _UPPER_LEFT)
            if mask is not None and mask.ndim == 3:
                mask = mask.unflatten(0, (q.shape[0], -1))
            if kind in _BOTTOM_RIGHT:
                mask = packed.bottom_right(q, k)
                causal = mask is None
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return served(context, NAME, q, k, v, mask, p, causal, scale, False).transpose(1, 2)

        one_head = query.ndim == 3
        q, k, v = (x.unsqueeze(2) if one_head else x for x in (query, key, value))
        if kind in _PACKED:
            starts = (attn_bias.q_seqinfo.seqstart_py, attn_bias.k_seqinfo.seqstart_py)
            found = None
            if p == 0.0 and (kind != "BlockDiagonalCausalMask" or starts[0] == starts[1]):
                of_q, of_k = (torch.tensor(x, dtype=torch.int32) for x in starts)
                causal = kind != "BlockDiagonalMask"
                found = packed.by_varlen(context, NAME, q[0], k[0], v[0], of_q, of_k, causal, scale)
            if found is None:
                found = packed.by_lengths(q[0], k[0], v[0], *starts, attention)
            o = found.unsqueeze(0)
        else:
            o = attention(q, k, v)
        return o.squeeze(2) if one_head else o

    return memory_efficient_attention


_PACKED = {"BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"}
_UPPER_LEFT = {"LowerTriangularMask", "BlockDiagonalCausalMask"}
_BOTTOM_RIGHT = {"LowerTriangularFromBottomRightMask", "BlockDiagonalCausalFromBottomRightMask"}
_CAUSAL = _UPPER_LEFT | _BOTTOM_RIGHT


def _unbind(stock: Function) -> Function:
    @functools.wraps(stock)
    def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
        return stock(x, dim) if present() is None else torch.unbind(x, dim)

    return unbind


PACKAGE = Package(("xformers.ops", "xformers.ops.fmha"), {NAME: _attention, "unbind": _unbind})
