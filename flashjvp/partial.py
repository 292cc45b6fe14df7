"""What the public functions do of windows and block masks: checks, and the names of the backends that serve them."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import block_plan, partial
from .errors import ArgumentTypeError, ArgumentValueError

Window = tuple[int, int]


def window_of(window: Any) -> Window | None:
    """(left, right) with -1 where a side is not bounded, or None where neither is."""
    if window is None:
        return None
    if not isinstance(window, tuple | list) or len(window) != 2:
        came = (
            f"{len(window)} of them"
            if isinstance(window, tuple | list)
            else f"an object of type {type(window).__name__}"
        )
        raise ArgumentTypeError(f"window: expected None or a pair (left, right), got {came}")
    sides = [-1 if side is None else side for side in window]
    for side in sides:
        if not isinstance(side, int) or isinstance(side, bool):
            came = f"an object of type {type(side).__name__}"
            raise ArgumentTypeError(f"window: expected two integers, or None for a side without bound, got {came}")
        if side < -1 or side >= 2**31:
            expected = "numbers of keys below 2^31, or -1 for a side without bound"
            raise ArgumentValueError(f"window: expected {expected}, got {side}")
    return None if sides == [-1, -1] else (sides[0], sides[1])


def name_of(backend: Any, window: Window | None) -> Any:
    """The name by which operators find what serves a call of `backend` with a window."""
    return backend if window is None else f"window:{window[0]}:{window[1]}:{_local(backend)}"


def name_of_blocks(backend: Any) -> str:
    """The same with a block mask."""
    return f"blocks:{_local(backend)}"


def _local(backend: Any) -> Any:
    return "best" if backend is None else backend


def is_block_mask(mask: object) -> bool:
    """Whether a mask is a BlockMask of PyTorch's flex attention."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")  # which imports the compiler: of a mask, it was
    return flex is not None and isinstance(mask, flex.BlockMask)


def plan_of(mask: Any, q: object, k: object, window: Window | None, is_causal: object) -> Tensor:
    """What operators take for a block mask, of the parts in a window and, if so, not after the query."""
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.ndim < 2 or k.ndim < 2:
        return torch.empty(0, dtype=torch.int32)  # which the checks of the call refuse
    rows, keys = q.shape[-2], k.shape[-2]
    if tuple(mask.seq_lengths) != (rows, keys):
        came = f"one of {mask.seq_lengths[0]} and {mask.seq_lengths[1]}"
        raise ArgumentValueError(f"attn_mask: expected a BlockMask of {rows} queries and {keys} keys, got {came}")
    if mask.kv_num_blocks.device != q.device:
        came = str(mask.kv_num_blocks.device)
        raise ArgumentValueError(f"attn_mask: expected a BlockMask on the device of q, {q.device}, got one on {came}")
    band = None
    if window is not None or is_causal is True:
        band = partial.band(*(window or (-1, -1)), rows, keys, is_causal is True)
    made: Callable[..., Tensor] = block_plan.plan_of
    if torch.compiler.is_compiling():  # not before: the decorator imports the compiler
        made = torch.compiler.disable(made)
    return made(mask, rows, keys, band)


def check_entries(mask: Any, q: Any) -> None:
    """A block mask has one batch entry or those of canonical queries, and one head or theirs."""
    entries, heads = mask.kv_num_blocks.shape[:2]
    batch, of_q = (q.shape[-4] if q.ndim > 3 else 1), q.shape[-3]
    if entries not in (1, batch) or heads not in (1, of_q):
        came = f"one of {entries} and {heads}"
        raise ArgumentValueError(
            f"attn_mask: expected a BlockMask of 1 or {batch} batch entries and 1 or {of_q} heads, got {came}"
        )
