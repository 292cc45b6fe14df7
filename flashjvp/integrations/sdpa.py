"""What stands for `torch.nn.functional.scaled_dot_product_attention`, and how any replaced attention is served."""

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from .. import _torch
from ..api import attention
from ..errors import FlashJVPError, UnsupportedError
from . import dense
from .active import THREAD, present

if TYPE_CHECKING:
    from .replaced import Replaced

Maybe = Tensor | None
NAME = "scaled_dot_product_attention"
STOCK = F.scaled_dot_product_attention


class _Wanted(threading.local):
    """The weights of attention, where what calls it wants them beside (multihead.py)."""

    def __init__(self) -> None:
        self.weights: list[Tensor] | None = None


WANTED = _Wanted()
ANY_WANTED: list[None] = []  # one item for each thread that wants them: other calls need not read a thread's own


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Maybe = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's function by `flashjvp.attention`, in a context of `flashjvp.replaced`; PyTorch's own outside of any."""
    if not is_dynamo_compiling():
        contexts = THREAD.contexts
        context = contexts[-1] if contexts else None
        if context is not None and context.entered and context.is_plain and not ANY_WANTED:
            # The same as below for most calls, in few steps: where caches are cold, each function costs about 1 us.
            try:
                o = attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            except FlashJVPError as error:
                call = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
                return _refused(context, NAME, error, *call)
            report_of = context.report_of
            calls = report_of.calls
            calls.append((NAME, query.device, query.dtype))
            if len(calls) >= report_of.stop_at:
                report_of.look_and_count()
            return o
    return _of_any_call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _of_any_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Maybe, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    context = present()
    if context is None:
        return STOCK(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if WANTED.weights is not None:
        WANTED.weights.append(dense.weights(query, key, attn_mask, is_causal, scale, enable_gqa))
    if context.when == "jvp" and context.leaves_alone((query, key, value, attn_mask)):
        context.report_of.add(NAME, "PyTorch", "no tangent")
        return STOCK(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return served(context, NAME, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def served(
    context: "Replaced", name: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Maybe, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """The attention that a replaced function of this name stands for: by flashjvp, else dense or an error."""
    try:
        o = attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, precision=context.precision)
    except FlashJVPError as error:
        return _refused(context, name, error, q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    context.report_of.add_attention(name, q)
    return o if context.precision is None else o.to(_dtype_of_stock(q))


def _dtype_of_stock(q: Tensor) -> torch.dtype:
    """Of the result of PyTorch's function, which models rely on."""
    device_type = q.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return q.dtype


def _refused(
    context: "Replaced", name: str, error: FlashJVPError, q: Tensor, k: Tensor, v: Tensor, attn_mask: Maybe,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What becomes of a call that flashjvp refuses: dense equations, which are reported, or its error."""
    if context.fallback != "dense":
        if isinstance(error, UnsupportedError):
            error.add_note(_HINT)
        raise error
    o = dense.attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    context.report_of.add_attention(name, q, "dense equations", str(error))
    return o


_HINT = "flashjvp.replaced(fallback='dense') computes what flashjvp refuses by dense equations, and reports it"


def unsupported(context: "Replaced", name: str, why: str) -> UnsupportedError:
    """The error of a replaced function that has no meaning in terms of attention here, nor dense equations."""
    context.report_of.add(name, "refused", why)
    return UnsupportedError(f"{name}: expected arguments that flashjvp knows the meaning of, got {why}")


def any_tangent(tensors: Any) -> bool:
    """Whether one of them carries a tangent at some level.

    torch.compile cannot tell: true. Under torch.func.jvp what was computed from a primal counts, too: PyTorch takes
    2 us to say whether a tensor has a tangent there.
    """
    if torch.compiler.is_compiling():
        return True
    if not _torch.may_carry_tangents():
        return False
    if _torch.is_in_func_jvp():
        tensors = [x for x in tensors if isinstance(x, Tensor) and _torch.is_wrapped(x)]  # others have none there
        if any(map(_torch.is_of_innermost_level, tensors)):
            return True
    return any(map(_torch.carries_tangent, tensors))
