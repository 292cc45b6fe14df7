"""What an error about arguments says beyond what was expected: the mistake that is likely behind it.

Called on failure only. A hint is empty, or starts with what sets it off from the message.
"""

import torch

Shape = tuple[int, ...]


def of_type(x: object) -> str:
    """For an object that is no tensor where one was expected."""
    if type(x).__module__ == "numpy":
        return ": torch.from_numpy makes a tensor of it"
    return ": it was not given" if x is None else ""


def of_layout(layout: torch.layout) -> str:
    """For a tensor of another layout than the one that is taken."""
    return ": attention_varlen takes it" if layout is torch.jagged else ""


def of_flag(name: str, x: object) -> str:
    """For an object that is no bool where one was expected."""
    if type(x).__module__ == "numpy" or (isinstance(x, torch.Tensor) and x.ndim == 0):
        return f": bool({name}) makes one of it"
    return ": a mask is given as attn_mask" if isinstance(x, torch.Tensor) else ""


def of_mask_dtype(dtype: torch.dtype) -> str:
    """For a mask of another type than those that are taken."""
    if dtype.is_floating_point:
        return ": attn_mask.to(q.dtype) is taken"
    return ": attn_mask.bool() is taken, if other numbers than 0 let a key take part"


def of_mask_shape(shape: Shape, scores: Shape) -> str:
    """For a mask that has no dim for the heads: [B, N] or [B, M, N] where [B, 1, 1, N] or [B, 1, M, N] would do."""
    *batch, _, rows, keys = scores if len(scores) > 2 else (1, *scores)
    if len(batch) != 1:
        return ""
    if shape == (*batch, keys):
        return ": attn_mask[:, None, None, :] says which keys of a batch entry take part"
    if shape in ((*batch, rows, keys), (*batch, 1, keys)):
        return ": attn_mask[:, None] leaves out the heads"
    return ""


def of_tangent(name: str, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> str:
    """For a tensor in the place of q_t, the fourth, where `attention` has its mask."""
    if name != "q_t" or x.ndim < 2 or q.ndim < 2 or k.ndim < 2:
        return ""
    is_mask = x.shape[-1] == k.shape[-2] and x.shape[-2] in (1, q.shape[-2]) and x.shape != q.shape
    return ": a mask is given as attn_mask" if is_mask or x.dtype == torch.bool else ""


def of_heads(q: Shape, k: Shape, v: Shape) -> str:
    """For numbers of heads that do not fit where they would if rows and heads were exchanged."""
    heads, rows = {q[-2], k[-2], v[-2]}, k[-3] == v[-3]
    return ": they fit with rows and heads exchanged, which `layout` says" if len(heads) == 1 and rows else ""
