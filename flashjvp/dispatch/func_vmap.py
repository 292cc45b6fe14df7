"""Calls `attention` and `attention_jvp` under torch.func.vmap without it: the mapped dim is a batch dim of theirs.

The tensors are taken out of the transform, which is left for the call and entered again. The operators' own rules
(operators.py) serve everything else: a mask that is mapped, one head without a dim for it, what raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _torch
from ..errors import FlashJVPError
from . import derivatives

Maybe = Tensor | None
_VMAP = _torch.VMAP if derivatives.BY_LEVEL and _torch.CAN_CALL_BELOW_VMAP else None


def under_vmap(function: Callable[..., Any], tensors: Sequence[Any], **options: Any) -> Any:
    """The results of a public function where vmap is the innermost transform and maps some of the tensors, else None.

    `tensors` are q, k, v, and their tangents if it takes them; the masks are among the options.
    """
    if _VMAP is None or not _torch.transforms_active() or _torch.is_watched() or _torch.dispatch_modes():
        return None
    transform = _torch.innermost_transform()
    masks = [x for name in ("attn_mask", "attn_mask_t") if (x := options.get(name)) is not None]
    if transform.key().value != _VMAP or not all([x is None or type(x) is Tensor for x in (*tensors, *masks)]):
        return None
    q, k, v, *_ = tensors
    if q is None or k is None or v is None or not q.ndim == k.ndim == v.ndim >= 3:
        return None
    level = transform.level()
    if any([_torch.unwrap_mapped(x, level)[1] is not None for x in masks]):
        return None
    found: list[tuple[Any, int | None]] = [
        (None, None) if x is None else _torch.unwrap_mapped(x, level) for x in tensors
    ]
    size = next((x.shape[dim] for x, dim in found if dim is not None), None)
    if size is None:
        return None
    layer = _torch.pop_transform()
    try:
        results = function(*[None if x is None else _leading(x, dim, size) for x, dim in found], **options)
    except FlashJVPError:  # which would speak of shapes that the caller does not see
        return None
    finally:
        _torch.push_transform(layer)
    if isinstance(results, Tensor):
        return _torch.wrap_mapped(results, 0, level)
    return tuple([_torch.wrap_mapped(x, 0, level) for x in results])


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with the mapped dim in front."""
    if dim is None:
        return x.expand(size, *x.shape)
    return x.movedim(dim, 0) if dim else x  # mutate: return x movedim
