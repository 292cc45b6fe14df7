"""What stands for the tensors that a call lacks: tangents and cotangents that are zero, gradients that nobody wants.

A descriptor of one row of eight columns does. TMA copies zeros from beyond a tensor's end and stores nothing there, so
a missing tangent takes no memory and nearly no time to read, and the kernels need not know that it is missing.
"""

from torch import Tensor

from ...operands import Inputs


def with_zeros(inputs: Inputs) -> Inputs:
    """The inputs with a tangent each: what is missing is zero."""
    if all(x is not None for x in inputs):
        return inputs
    zeros = zero(inputs.q)
    return Inputs(*[zeros if x is None else x for x in inputs])


def zero(like: Tensor) -> Tensor:
    """Of any size: zeros."""
    return like.new_zeros(1, 1, 1, 8)  # mutate: return like new_zeros


def unwanted(like: Tensor) -> Tensor:
    """Takes a result of any size that nobody wants."""
    return like.new_empty(1, 1, 1, 8)


def with_unwanted(like: Tensor, grads: Inputs, jvp: bool) -> Inputs:
    """The gradients that the kernels write: all of them, or all but those of tangents."""
    if all(x is not None for x in grads[: 6 if jvp else 3]):
        return grads
    nobody = unwanted(like)
    return Inputs(*[nobody if x is None and i < (6 if jvp else 3) else x for i, x in enumerate(grads)])
