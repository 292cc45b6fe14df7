"""Norms that are right where a JVP is differentiated in reverse, as PyTorch's own are not.

PyTorch's formula of their tangents takes the saved mean and 1 / std for constants (docs/layer-norm-jvp.md); that of
their backward pass does not. Without weight and bias the Jacobian of a norm is symmetric, so the tangent of the output
is what the backward pass makes of the tangent of the input: one fused kernel, which is right in reverse.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .errors import ArgumentValueError

Maybe = Tensor | None
# PyTorch's own, whatever stands in their place later.
_LAYER_NORM = torch.layer_norm
_BATCH_NORM: Any = torch.batch_norm
_INSTANCE_NORM: Any = torch.instance_norm
_GROUP_NORM = torch.group_norm
_HALF = (torch.float16, torch.bfloat16)


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation that is right under every derivative: a drop-in for `torch.nn.functional.layer_norm`.

    Over the last dims, those of `normalized_shape`::

        o = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    Args:
        input: x [..., *normalized_shape], of any floating point dtype.
        normalized_shape: the sizes of the dims that are normalised.
        weight: [*normalized_shape], or None = 1.
        bias: [*normalized_shape], or None = 0.
        eps: added to the variance, in its unit.

    Returns:
        o, with the shape of x; its numbers and its dtype are those of PyTorch's, also under autocast.

    Derivatives:
        Both modes, to any order, in x, weight and bias. Reverse mode through a JVP is right, which PyTorch's is not.

    Raises:
        What PyTorch's raises.

    Numerics:
        Tangents are computed in float32 at least, and rounded once. Without a tangent the call is PyTorch's own.

    Source:
        docs/layer-norm-jvp.md.
    """
    given = (input, weight, bias)
    if torch.compiler.is_compiling():  # whose tracer cannot tell which tensors have tangents
        return _written_out_layer_norm(input, normalized_shape, weight, bias, eps)
    if not _torch.may_carry_tangents() or not any(map(_torch.carries_tangent, given)):
        return _LAYER_NORM(input, normalized_shape, weight, bias, eps)
    split = _split(given)
    if split is None:
        return _written_out_layer_norm(input, normalized_shape, weight, bias, eps)
    (x, x_t), (w, w_t), (b, b_t) = split
    assert x is not None
    shape = list(normalized_shape)
    o = _LAYER_NORM(x, shape, w, b, eps)
    normed, mean, rstd = torch.native_layer_norm(_wide(x), shape, None, None, eps)
    if x_t is not None:
        backward = torch.ops.aten.native_layer_norm_backward
        x_t = backward(_wide(x_t), _wide(x), shape, mean, rstd, None, None, (True, False, False))[0]
    return _dual(o, normed, x_t, w, w_t, b_t)


def batch_norm(
    input: Tensor,
    running_mean: Maybe,
    running_var: Maybe,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation that is right under every derivative: a drop-in for `torch.nn.functional.batch_norm`.

    Over all dims but the second one, that of channels::

        o = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          (training)
        o = (x - running_mean) / sqrt(running_var + eps) * weight + bias

    Args:
        input: x [N, C, ...], of any floating point dtype.
        running_mean: [C], or None. In training it moves towards the mean of the batch, in place.
        running_var: [C], or None, likewise with the unbiased variance.
        weight: [C], or None = 1.
        bias: [C], or None = 0.
        training: True takes mean and variance of the batch.
        momentum: how far the running statistics move, from 0 to 1.
        eps: added to the variance, in its unit.

    Returns:
        o, with the shape of x; its numbers and its dtype are those of PyTorch's, also under autocast.

    Derivatives:
        Both modes, to any order, in x, weight and bias. Reverse mode through a JVP is right, which that of PyTorch's in
        training is not. The running statistics have no derivative.

    Raises:
        ArgumentValueError: (a ValueError) one number for each channel in training, as PyTorch's.
        What else PyTorch's raises.

    Numerics:
        As `layer_norm`.

    Source:
        docs/layer-norm-jvp.md.
    """
    if training and input.ndim > 1 and input.numel() == input.shape[1] > 0:
        raise ArgumentValueError(
            f"input: expected more than one number for each channel in training, got shape {list(input.shape)}"
        )
    given = (input, weight, bias)
    rest: tuple[Any, ...] = (running_mean, running_var, training, momentum, eps)
    if training and torch.compiler.is_compiling():
        return _written_out_batch_norm(input, weight, bias, *rest)
    is_stock = not training or input.numel() == 0  # the kernels below take no empty batch
    if is_stock or not _torch.may_carry_tangents() or not any(map(_torch.carries_tangent, given)):
        return _stock_batch_norm(input, weight, bias, *rest)
    split = _split(given)
    if split is None:
        return _written_out_batch_norm(input, weight, bias, *rest)
    (x, x_t), (w, w_t), (b, b_t) = split
    assert x is not None
    o = _stock_batch_norm(x, w, b, *rest)
    normed, mean, rstd = torch.native_batch_norm(_wide(x), None, None, None, None, True, 0.0, eps)
    if x_t is not None:
        backward = torch.ops.aten.native_batch_norm_backward
        x_t = backward(_wide(x_t), _wide(x), None, None, None, mean, rstd, True, eps, (True, False, False))[0]
    return _dual(o, normed, x_t, *(_of_channels(y, x.ndim) for y in (w, w_t, b_t)))


def instance_norm(
    input: Tensor, weight: Maybe, bias: Maybe, running_mean: Maybe, running_var: Maybe, use_input_stats: bool,
    momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    """`torch.instance_norm`, which is a batch norm of its own for each sample, with the right derivatives."""
    given = (input, weight, bias)
    stock = functools.partial(_INSTANCE_NORM, cudnn_enabled=torch.backends.cudnn.enabled)
    if not use_input_stats or not (torch.compiler.is_compiling() or any(map(_torch.carries_tangent, given))):
        return stock(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)
    # PyTorch's own moves the running statistics, and says what the dtype is.
    dtype = stock(input.detach(), None, None, running_mean, running_var, use_input_stats, momentum, eps).dtype
    weight, bias = (_of_channels(y, input.ndim) for y in (weight, bias))
    return _normalised(input, tuple(range(2, input.ndim)), weight, bias, eps).to(dtype)


def group_norm(input: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float) -> Tensor:
    """`F.group_norm`: PyTorch's derivatives are right, but channels last there is no tangent, nor one to be traced."""
    if not torch.compiler.is_compiling():
        return _GROUP_NORM(
            input.contiguous() if _torch.carries_tangent(input) else input, num_groups, weight, bias, eps
        )
    dtype = _GROUP_NORM(input.new_zeros(1, num_groups, 2), num_groups).dtype  # autocast has a rule
    x = _normalised(input.reshape(input.shape[0], num_groups, -1), (-1,), None, None, eps).reshape(input.shape)
    weight, bias = (_of_channels(y, input.ndim) for y in (weight, bias))
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(dtype)


def _split(given: Sequence[Maybe]) -> list[tuple[Maybe, Maybe]] | None:
    """Primals and tangents; None where the tangents are of a level further out, or these have tangents of their own."""
    if not _torch.level_gives_tangents():
        return None
    pairs: list[tuple[Maybe, Maybe]] = [(None, None) if y is None else _torch.unpack_dual(y) for y in given]
    return None if any(_torch.carries_tangent(y) for pair in pairs for y in pair) else pairs


def _dual(o: Tensor, normed: Tensor, x_t: Maybe, w: Maybe, w_t: Maybe, b_t: Maybe) -> Tensor:
    """o with its tangent, of which `x_t` is the part that comes from the input, before it is weighed."""
    terms = []
    if x_t is not None:
        terms.append(x_t if w is None else x_t * w)
    if w_t is not None:
        terms.append(normed * w_t)
    if b_t is not None:
        terms.append(b_t.expand(normed.shape))
    first, *others = terms
    for term in others:
        first = first + term
    return _torch.make_dual(o, first.to(o.dtype))


def _written_out_layer_norm(input: Tensor, shape: Sequence[int], weight: Maybe, bias: Maybe, eps: float) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type):  # which has a rule for the dtype of the result
        dtype = _LAYER_NORM(input, shape, weight, bias, eps).dtype
    return _normalised(input, dims, weight, bias, eps).to(dtype)


def _stock_batch_norm(*args: Any) -> Tensor:
    return _BATCH_NORM(*args, torch.backends.cudnn.enabled)


def _written_out_batch_norm(
    input: Tensor, weight: Maybe, bias: Maybe, running_mean: Maybe, running_var: Maybe, training: bool, momentum: float,
    eps: float,
) -> Tensor:  # fmt: skip
    # PyTorch's own moves the running statistics, and says what the dtype is.
    dtype = _stock_batch_norm(input.detach(), None, None, running_mean, running_var, training, momentum, eps).dtype
    weight, bias = (_of_channels(y, input.ndim) for y in (weight, bias))
    return _normalised(input, (0, *range(2, input.ndim)), weight, bias, eps).to(dtype)


def _normalised(input: Tensor, dims: tuple[int, ...], weight: Maybe, bias: Maybe, eps: float) -> Tensor:
    x = _wide(input)
    x = x - x.mean(dims, keepdim=True)
    x = x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _of_channels(y: Maybe, ndim: int) -> Maybe:
    return None if y is None else y.view(1, -1, *(1,) * (ndim - 2))
