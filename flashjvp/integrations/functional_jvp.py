"""What stands for `torch.autograd.functional.jvp`, which differentiates in reverse twice: forward mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import functional

from .. import _torch
from ..errors import UnsupportedError
from .active import present

NAME = "torch.autograd.functional.jvp"
STOCK = functional.jvp


def jvp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    """PyTorch's function; in a context by `torch.func.jvp`."""
    context = present()
    if context is None:
        return STOCK(func, inputs, v, create_graph, strict)
    if strict:
        context.report_of.add(NAME, "refused", "strict=True")
        raise UnsupportedError("strict: expected False (forward mode cannot tell what is independent), got True")
    context.report_of.add(NAME, "flashjvp", "by forward mode")
    xs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if v is None:
        if len(xs) != 1 or xs[0].numel() != 1:
            raise RuntimeError("v: expected a vector, got None, which stands for 1 with one input of one element")
        v = torch.ones_like(xs[0])
    vs = (v,) if isinstance(v, Tensor) else tuple(v)
    if not create_graph:
        xs, vs = (tuple(x.detach() for x in tensors) for tensors in (xs, vs))
    with torch.set_grad_enabled(create_graph):
        o, o_t = torch.func.jvp(func, xs, vs)  # type: ignore[misc]
    return (o, o_t) if create_graph else _torch.pytree.tree_map(lambda x: x.detach(), (o, o_t))
