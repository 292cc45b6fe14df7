"""What stands for `torch.utils.checkpoint.checkpoint`: right in a JVP, and recomputed in the context of its forward.

A backward pass may run in another thread, or after the context has ended. What is recomputed there enters it again.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from .. import _torch
from ..checkpoint import checkpoint as right_checkpoint
from .active import present

if TYPE_CHECKING:
    from .replaced import Replaced

NAME = "checkpoint"
STOCK = torch_checkpoint.checkpoint


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None, **kwargs: Any) -> Any:
    """PyTorch's function, in a context also inside a JVP."""
    context = None if torch.compiler.is_compiling() else present()
    if context is None:
        return STOCK(function, *args, use_reentrant=use_reentrant, **kwargs)
    function = functools.partial(_in_context, context, function)
    if not context.checkpoint or not _torch.may_carry_tangents():
        context.report_of.add(NAME, "PyTorch", "no tangent" if context.checkpoint else "checkpoint=False")
        return STOCK(function, *args, use_reentrant=use_reentrant, **kwargs)
    context.report_of.add(NAME, "flashjvp", "inside a JVP")
    return right_checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)


def _in_context(context: "Replaced", function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if present() is context:
        return function(*args, **kwargs)
    with context:
        return function(*args, **kwargs)
