"""The operands of a call as operators take them: checked, cast for autocast, of one rank, batch dims broadcast."""

import torch
from torch import Tensor

from . import call_forms, checks
from .operands import Inputs, Operands

Maybe = Tensor | None

_HALF = (torch.float16, torch.bfloat16)
_AUTOCAST_FROM = (*_HALF, torch.float32)


def canonical(x: Operands, enable_gqa: bool, backend: str | None, keys: int | None = None) -> Operands:
    """The operands, checked, cast for autocast, and viewed with the ranks and batch dims that operators take.

    keys: how many columns a mask has for; None = as many as k has rows.
    """
    checks.tensors(x)
    x = _autocast(x)
    checks.dtypes_and_devices(x, backend)
    x = _of_one_rank(x)
    leading = checks.shapes(x, enable_gqa)
    if leading is not None:
        of_q, of_kv = leading
        dims = Inputs(of_q, of_kv, of_kv, of_q, of_kv, of_kv)
        x = Operands._make([*map(_expand, x.inputs, dims), x.mask, x.mask_t, x.seed])
    checks.head_dims(x, backend)
    x = call_forms.with_columns(x)
    if x.mask is not None:
        checks.mask_shape(x.mask.shape, (*x.q.shape[:-1], x.k.shape[-2] if keys is None else keys))
    if x.q.ndim == 2:
        x = x.map(lambda tensor: tensor.unsqueeze(0))
    if x.mask is not None and x.mask.ndim < x.q.ndim:
        shape = (1,) * (x.q.ndim - x.mask.ndim) + x.mask.shape
        x = x.map_masks(lambda mask: mask.view(shape))
    return x


def _of_one_rank(x: Operands) -> Operands:
    """With leading dims of size 1, where the ranks of the inputs differ: aligned at the right, as they broadcast."""
    checks.ranks_and_tangents(x)
    if x.q.ndim == x.k.ndim == x.v.ndim:  # and so have the tangents
        return x
    rank = max(x.q.ndim, x.k.ndim, x.v.ndim)
    return x.map(lambda tensor: tensor if tensor.ndim == rank else tensor[(None,) * (rank - tensor.ndim)])


def _expand(x: Maybe, leading: checks.Shape) -> Maybe:
    if x is None or x.shape[:-2] == leading:
        return x
    *_, heads = leading
    if x.shape[-3] not in (1, heads):  # k and v of unequal numbers of heads
        x = x.repeat_interleave(heads // x.shape[-3], dim=-3)
    return x.expand(*leading, *x.shape[-2:])


def _autocast(x: Operands) -> Operands:
    """As PyTorch's autocast casts for its own attention, except that a float32 mask keeps its precision."""
    device_type = x.q.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # there is no autocast for meta
        return x
    dtype = torch.get_autocast_dtype(device_type)
    x = x.map(lambda tensor: tensor.to(dtype) if tensor.dtype in _AUTOCAST_FROM else tensor)
    return x.map_masks(lambda mask: mask.to(dtype) if mask.dtype in _HALF else mask)
