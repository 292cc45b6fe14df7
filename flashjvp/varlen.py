"""Attention of packed sequences, which lie one after the other without padding: groups of equal lengths are calls."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import call_forms, checks
from .api import attention
from .errors import ArgumentTypeError, ArgumentValueError


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int | None = None,
    max_k: int | None = None,
    *,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention within each of several sequences that are packed one after the other, by their cumulated lengths.

    With rows q[cu_q[b] : cu_q[b + 1]], and keys and values [cu_k[b] : cu_k[b + 1]], for each sequence b and head::

        S = c * q @ k.T      P = softmax(S)      o = P @ v

    It is built of calls of `attention`, one for all sequences of the same two lengths, which are copied into a batch,
    and so are the results. What it costs beyond that: the host reads `cu_q` and `cu_k`, which waits for the device
    unless they are on the CPU (also where `max_q` and `max_k` are given), and as many launches as there are different
    pairs of lengths. torch.compile breaks its graph where it reads.

    Args:
        q: queries [total_q, Hq, D], of any dtype that `attention` takes.
        k: keys [total_k, Hkv, D]; the dtype and device of q.
        v: values [total_k, Hkv, Dv]; the dtype and device of q.
        cu_q: where sequences of queries start, and where the last one ends: [B + 1], int32 or int64, 0 at first, then
            never less than before, total_q at last. On q's device or the CPU. A sequence may be empty.
        cu_k: the same for keys and values, which end at total_k.
        max_q: at least the number of rows of the longest sequence of queries; None = any. Nothing else follows from it.
        max_k: the same for keys.
        is_causal: True aligns the last query of a sequence with its last key, as flash_attn does: query m of M sees
            keys n <= m + N - M of N. (`attention` aligns the first ones; that is the same where M = N.) Where the
            lengths differ, that takes a mask of M * N bytes for each pair of lengths.
        scale: as in `attention`: c, a finite real number without unit; None = D**-0.5.
        enable_gqa: as in `attention`: True lets Hq be a multiple of Hkv.
        backend: as in `attention`: "triton", "tiled", "reference" or None.

    Returns:
        o [total_q, Hq, Dv], of q's dtype and device. Zeros for a query that may see no key.

    Derivatives:
        Those of `attention` in q, k, v: reverse mode, forward mode (`torch.func.jvp`, `torch.autograd.forward_ad`), and
        reverse mode through both.

    Raises:
        ArgumentTypeError: as `attention`, and for cumulated lengths of another type.
        ArgumentValueError: as `attention`, and for cumulated lengths that do not start at 0, decrease, end elsewhere
            than the tensors, or have a sequence longer than `max_q` or `max_k`.
        UnsupportedError: as `attention`.
        SecondOrderError: as `attention`.

    Numerics:
        Those of `attention`: the bits are those of a call for each group.

    Source:
        The arguments are those of flash_attn_varlen_func (FlashAttention-2, arXiv 2307.08691).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _packed(name, x)
    scale = call_forms.number("scale", scale, q)
    checks.options(0.0, is_causal, scale, enable_gqa)
    of_q, of_k = _lengths("cu_q", cu_q, q, "max_q", max_q), _lengths("cu_k", cu_k, k, "max_k", max_k)
    if len(of_q) != len(of_k):
        raise ArgumentValueError(
            f"cu_k: expected as many sequences as cu_q, {len(of_q)}, got cumulated lengths of {len(of_k)}"
        )
    if v.shape[0] != k.shape[0]:
        raise ArgumentValueError(f"v: expected as many rows as k, {k.shape[0]}, got shape {list(v.shape)}")
    if not of_q:  # no sequence is as good as an empty one, which records derivatives
        of_q = of_k = [0]
    rows, keys, values = q.split(of_q), k.split(of_k), v.split(of_k)
    results: dict[int, Tensor] = {}
    for group in _groups(of_q, of_k):
        q_b, k_b, v_b = (torch.stack([x[b] for b in group]) for x in (rows, keys, values))
        mask, causal = _causal(of_q[group[0]], of_k[group[0]], q.device) if is_causal else (None, False)
        o = attention(q_b, k_b, v_b, mask, 0.0, causal, scale, enable_gqa, backend=backend, layout="bmhd")
        results.update(zip(group, o.unbind(), strict=True))
    return torch.cat([results[b] for b in range(len(of_q))])


def _packed(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor, got an object of type {type(x).__name__}")
    if x.ndim != 3:
        raise ArgumentValueError(f"{name}: expected 3 dims, [total rows, H, D], got shape {list(x.shape)}")


def _lengths(name: str, cu: Any, x: Tensor, limit: str, longest: Any) -> list[int]:
    """The length of each sequence, from where they start and end in x."""
    if not isinstance(cu, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor, got an object of type {type(cu).__name__}")
    if cu.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(f"{name}: expected a dtype of torch.int32 or torch.int64, got {cu.dtype}")
    if cu.ndim != 1 or cu.shape[0] < 1:
        raise ArgumentValueError(f"{name}: expected shape [B + 1], got shape {list(cu.shape)}")
    if cu.device.type == "meta" or (cu.device.type != "cpu" and cu.device != x.device):
        raise ArgumentValueError(f"{name}: expected a tensor on the device of q or on the cpu, got one on {cu.device}")
    ends = cu.tolist()
    if ends[0] != 0:
        raise ArgumentValueError(f"{name}: expected cumulated lengths that start at 0, got {ends[0]} at first")
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    for b, length in enumerate(lengths):
        if length < 0:
            raise ArgumentValueError(f"{name}: expected cumulated lengths, got {ends[b + 1]} after {ends[b]}")
    if ends[-1] != x.shape[0]:
        raise ArgumentValueError(f"{name}: expected cumulated lengths that end at {x.shape[0]}, got {ends[-1]} at last")
    if longest is not None:
        _limit(limit, longest, max(lengths, default=0))
    return lengths


def _limit(name: str, limit: Any, longest: int) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise ArgumentTypeError(f"{name}: expected an int or None, got an object of type {type(limit).__name__}")
    if limit < longest:
        raise ArgumentValueError(f"{name}: expected at least the {longest} rows of the longest sequence, got {limit}")


def _groups(of_q: Sequence[int], of_k: Sequence[int]) -> Iterator[list[int]]:
    """The sequences of each pair of lengths."""
    found: dict[tuple[int, int], list[int]] = {}
    for b, pair in enumerate(zip(of_q, of_k, strict=True)):
        found.setdefault(pair, []).append(b)
    yield from found.values()


def _causal(rows: int, keys: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """The mask and `is_causal` that align the last query with the last key."""
    if rows == keys:
        return None, True
    if rows <= 1:  # a query that is the last one sees every key
        return None, False
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows), False
