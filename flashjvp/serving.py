"""Which backend serves a call with a window, a mask that is no plain tensor, or a precision, and what it takes."""

from typing import Any, NamedTuple

from torch import Tensor

from . import causal_bias, partial
from .backends import high as high  # importing it registers the backend
from .errors import ArgumentTypeError, ArgumentValueError, UnsupportedError

HIGH = "high"


class Serving(NamedTuple):
    """The name of the backend, what it takes for a mask and for `is_causal`, and the block mask if there is one."""

    name: Any
    attn_mask: Any
    is_causal: Any
    block_mask: Any


def serving(
    q: object, k: object, attn_mask: Any, is_causal: Any, window: Any, precision: Any, backend: Any
) -> Serving:  # fmt: skip
    """Of the arguments of a call of `attention`."""
    check_precision(precision, window, attn_mask)
    name, block_mask = backend, None
    window = partial.window_of(window)
    if window is not None:
        name = partial.name_of(backend, window)
    if attn_mask is not None and type(attn_mask) is not Tensor:
        if partial.is_block_mask(attn_mask):
            block_mask, attn_mask = attn_mask, partial.plan_of(attn_mask, q, k, window, is_causal)
            name, is_causal = partial.name_of_blocks(backend), is_causal if is_causal is not True else False
        else:
            attn_mask, is_causal = plain_mask(attn_mask, is_causal, q, k)
    if precision is not None:
        name = f"{HIGH}:{'best' if backend is None else backend}"  # mutate: name
    return Serving(name, attn_mask, is_causal, block_mask)


def check_precision(precision: object, window: Any = None, attn_mask: Any = None) -> None:
    """Raises where the argument is neither None nor a precision that there is, or one that a call cannot have."""
    if precision is None:
        return
    if not isinstance(precision, str):
        came = f"an object of type {type(precision).__name__}"
        raise ArgumentTypeError(f"precision: expected None or {HIGH!r}, got {came}")
    if precision != HIGH:
        raise ArgumentValueError(f"precision: expected None or {HIGH!r}, got {precision!r}")
    is_block_mask = partial.is_block_mask(attn_mask)
    if is_block_mask or partial.window_of(window) is not None:
        came = "a block mask" if is_block_mask else "a window"
        raise UnsupportedError(f"precision: expected None beside {came}, got {precision!r}")


def plain_mask(mask: Any, is_causal: bool, q: object, k: object) -> tuple[Any, bool]:
    """A causal bias of PyTorch's as what it means; any other mask as it is."""
    if not causal_bias.is_causal_bias(mask):
        return mask, is_causal
    plain, causal = causal_bias.meaning(mask, q, k)
    return plain, True if causal and is_causal is False else is_causal
