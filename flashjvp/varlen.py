"""Attention of packed sequences, which lie one after the other without padding."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch, call_forms, checks, jagged
from .backends import varlen as composed  # importing it registers the backends
from .canonical import canonical
from .dispatch import derivatives, fast_path
from .dispatch.schema import FORWARD, FORWARD_JVP, Operator
from .errors import ArgumentTypeError, ArgumentValueError
from .operands import Inputs, Operands, Options

Maybe = Tensor | None


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
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

    On a GPU with kernels it is one launch, in which each program finds its sequence: nothing is padded, and the host
    neither reads the lengths nor waits for them. Otherwise one sequence is computed after the other.

    Args:
        q: queries [total_q, Hq, D], of any dtype that `attention` takes. Or all of q, k, v are nested tensors of layout
            torch.jagged, [B, rows, H, D] or [B, H, rows, D], without `cu_q` and `cu_k`.
        k: keys [total_k, Hkv, D]; the dtype and device of q.
        v: values [total_k, Hkv, Dv]; the dtype and device of q.
        cu_q: where sequences of queries start, and where the last one ends: [B + 1], int32 or int64, 0 at first, then
            never less than before, total_q at last. On q's device or the CPU. A sequence may be empty. Numbers on the
            CPU are checked. Those on another device are not: there rows of no sequence get zeros.
        cu_k: the same for keys and values, which end at total_k.
        max_q: at least the number of rows of the longest sequence of queries; None = any. Nothing follows from it.
        max_k: the same for keys.
        is_causal: True aligns the last query of a sequence with its last key, as flash_attn does: query m of M sees
            keys n <= m + N - M of N. (`attention` aligns the first ones; that is the same where M = N.)
        scale: as in `attention`: c, a finite real number without unit; None = D**-0.5.
        enable_gqa: as in `attention`: True lets Hq be a multiple of Hkv.
        backend: as in `attention`: "triton", "tiled", "reference" or None.

    Returns:
        o [total_q, Hq, Dv], of q's dtype and device. Zeros for a query that may see no key. Of nested tensors a nested
        one, with dims in the order of q's.

    Derivatives:
        Those of `attention` in q, k, v: reverse mode, forward mode (`torch.func.jvp`, `torch.autograd.forward_ad`), and
        reverse mode through both. Nested tensors have no forward mode in PyTorch: `attention_varlen_jvp` takes theirs.

    Raises:
        ArgumentTypeError: as `attention`, and for cumulated lengths of another type.
        ArgumentValueError: as `attention`, and for cumulated lengths that do not start at 0, decrease, end elsewhere
            than the tensors, or have a sequence longer than `max_q` or `max_k`; for nested tensors whose lengths
            differ.
        UnsupportedError: as `attention`, and for lengths that differ along a dim of `torch.func.vmap`.
        SecondOrderError: as `attention`.

    Numerics:
        Those of `attention`: the bits are those of each sequence alone.

    Source:
        The arguments are those of flash_attn_varlen_func (FlashAttention-2, arXiv 2307.08691).
    """
    o, _ = _attention(Inputs(q, k, v), (cu_q, cu_k), (max_q, max_k), is_causal, scale, enable_gqa, backend, FORWARD)
    return o


def attention_varlen_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    q_t: Tensor | None = None,
    k_t: Tensor | None = None,
    v_t: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_varlen` and its JVP, from tangents that are given: what `attention_jvp` is to `attention`.

    For each sequence and head, with c the scale::

        S   = c * q @ k.T                       P  = softmax(S)         o   = P @ v
        S_t = c * (q_t @ k.T + q @ k_t.T)       mu = rowsum(P * S_t)    o_t = (P * (S_t - mu)) @ v + P @ v_t

    Args:
        q: queries [total_q, Hq, D], as in `attention_varlen`. Or all tensors are nested, without `cu_q` and `cu_k`.
        k: keys [total_k, Hkv, D]; the dtype and device of q.
        v: values [total_k, Hkv, Dv]; the dtype and device of q.
        cu_q: where sequences of queries start and end, as in `attention_varlen`.
        cu_k: the same for keys and values.
        max_q: as in `attention_varlen`.
        max_k: as in `attention_varlen`.
        q_t: tangent of q, of its shape, dtype and device; None = zero, and costs nothing.
        k_t: tangent of k, likewise.
        v_t: tangent of v, likewise.
        is_causal: as in `attention_varlen`: the last query of a sequence sees its last key.
        scale: as in `attention`; it has no tangent.
        enable_gqa: as in `attention`: True lets Hq be a multiple of Hkv.
        backend: as in `attention`: "triton", "tiled", "reference" or None.

    Returns:
        o and o_t, each [total_q, Hq, Dv], of q's dtype and device. Zeros for a query that may see no key. Nested, if q
        is.

    Derivatives:
        Reverse mode in q, k, v and their tangents, through o and o_t together. Forward mode raises.

    Raises:
        ArgumentTypeError: as `attention_varlen`, and for a tangent of another dtype.
        ArgumentValueError: as `attention_varlen`, and for a tangent without its primal's shape or on another device.
        UnsupportedError: as `attention_varlen`.
        SecondOrderError: forward mode, or reverse mode through the gradients.

    Numerics:
        Those of `attention_jvp`: the bits are those of each sequence alone.

    Source:
        flashjvp/kernels/MATH.md (1)-(20), of each sequence.
    """
    o, o_t = _attention(
        Inputs(q, k, v, q_t, k_t, v_t), (cu_q, cu_k), (max_q, max_k), is_causal, scale, enable_gqa, backend, FORWARD_JVP
    )
    assert o_t is not None
    return o, o_t


varlen = attention_varlen


def _attention(
    x: Inputs, cu: tuple[Any, Any], longest: tuple[Any, Any], is_causal: Any, scale: Any, enable_gqa: Any,
    backend: Any, operator: Operator,
) -> tuple[Tensor, Maybe]:  # fmt: skip
    """o and, of FORWARD_JVP, o_t."""
    x, cu, nested = jagged.packed(x, cu)
    served_by = composed.name_of(backend)
    tensors = x[:3] if operator is FORWARD else x
    given = (*tensors, *cu) if cu[0] is not cu[1] else (*tensors, cu[0])  # guards know no object twice
    options = is_causal, scale, served_by
    if run := fast_path.find(operator, given, options, enable_gqa):
        _check_limits(longest)
        _check_readable(x, cu, longest)
        o, *rest = run(given)
        return nested(o), nested(rest[0]) if operator is FORWARD_JVP else None
    for name, tensor in zip(x._fields, x, strict=True):
        if tensor is not None or name in ("q", "k", "v"):
            _packed(name, tensor)
    scale = call_forms.number("scale", scale, x.q)
    checks.options(0.0, is_causal, scale, enable_gqa)
    _check_starts(x, cu, longest)
    operands = _canonical(x, enable_gqa, backend)._replace(mask=_joined(cu, x.q))
    taken = Options(is_causal, None if scale is None else float(scale), served_by)
    o_t: Maybe = None
    if operator is FORWARD_JVP:
        o, o_t = derivatives.attention_jvp(operands, taken)
    else:
        o = derivatives.attention(operands, taken)
    if operator is FORWARD or operands.has_tangents:
        kept = operands.plain if operator is FORWARD else operands
        fast_path.keep(operator, given, options, enable_gqa, kept, functools.partial(_operands, len(tensors)))
    if (width := x.v.shape[-1]) != operands.v.shape[-1]:  # it has no column
        o, o_t = o[..., :width], None if o_t is None else o_t[..., :width]
    return nested(o), None if o_t is None else nested(o_t)


def _canonical(x: Inputs, enable_gqa: Any, backend: Any) -> Operands:
    """Checked operands as the backend takes them, rows first. Errors speak of heads before rows."""
    views = [None if y is None else y.transpose(0, 1).unsqueeze(0) for y in x]
    heads_first = Operands._make([*views, None, None, None])
    found = canonical(heads_first, enable_gqa, backend)
    return Operands._make([
        given if y is None or y is before else y.squeeze(0).transpose(0, 1)
        for given, before, y in zip((*x, None, None, None), heads_first, found, strict=True)
    ])  # fmt: skip


def _operands(count: int, tensors: Sequence[Any]) -> Sequence[Maybe]:
    """What an operator takes, of as many inputs and one or two tensors of cumulated lengths."""
    starts = _joined((tensors[count], tensors[-1]), tensors[0])
    return (*tensors[:count], starts, None) if count == 3 else (*tensors[:count], starts, None, None)


def _joined(cu: tuple[Tensor, Tensor], q: Tensor) -> Tensor:
    """Both cumulated lengths as the backend takes them, int32 [2, B + 1] on the device of q."""
    if cu[0].dtype == cu[1].dtype and cu[0].device == cu[1].device:
        return torch.stack(cu).to(device=q.device, dtype=torch.int32)
    return torch.stack([lengths.to(device=q.device, dtype=torch.int32) for lengths in cu])


def _check_starts(x: Inputs, cu: tuple[Any, Any], longest: tuple[Any, Any]) -> None:
    for name, lengths, rows in (("cu_q", cu[0], x.q), ("cu_k", cu[1], x.k)):
        _check_lengths(name, lengths, rows)
    _check_limits(longest)
    _check_readable(x, cu, longest)
    of_q, of_k = cu
    if of_q.shape[-1] != of_k.shape[-1]:
        raise ArgumentValueError(
            f"cu_k: expected as many sequences as cu_q, {of_q.shape[-1] - 1}, got cumulated lengths of "
            f"{of_k.shape[-1] - 1}"
        )
    if x.v.shape[0] != x.k.shape[0]:
        raise ArgumentValueError(f"v: expected as many rows as k, {x.k.shape[0]}, got shape {list(x.v.shape)}")


def _check_readable(x: Inputs, cu: tuple[Any, Any], longest: tuple[Any, Any]) -> None:
    """The numbers of lengths that are on the host, of every call."""
    if _is_readable(cu[0]):
        _check_numbers("cu_q", cu[0], x.q, "max_q", longest[0])
    if _is_readable(cu[1]):
        _check_numbers("cu_k", cu[1], x.k, "max_k", longest[1])


def _is_readable(lengths: Tensor) -> bool:
    """Whether the numbers are on the host, and no stand-ins of a transform or a compiler."""
    if torch.compiler.is_compiling() or type(lengths) is not Tensor or lengths.device.type != "cpu":
        return False
    return not _torch.is_wrapped(lengths)


def _packed(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor, got an object of type {type(x).__name__}")
    if x.ndim != 3:
        raise ArgumentValueError(f"{name}: expected 3 dims, [total rows, H, D], got shape {list(x.shape)}")


def _check_lengths(name: str, cu: Any, x: Tensor) -> None:
    if not isinstance(cu, Tensor):
        raise ArgumentTypeError(f"{name}: expected a tensor, got an object of type {type(cu).__name__}")
    if cu.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(f"{name}: expected a dtype of torch.int32 or torch.int64, got {cu.dtype}")
    if cu.ndim != 1 or cu.shape[0] < 1:
        raise ArgumentValueError(f"{name}: expected shape [B + 1], got shape {list(cu.shape)}")
    if cu.device.type == "meta" or (cu.device.type != "cpu" and cu.device != x.device):
        raise ArgumentValueError(f"{name}: expected a tensor on the device of q or on the cpu, got one on {cu.device}")


def _check_limits(longest: tuple[Any, Any]) -> None:
    for name, most in zip(("max_q", "max_k"), longest, strict=True):
        if most is not None and (not isinstance(most, int) or isinstance(most, bool)):
            raise ArgumentTypeError(f"{name}: expected an int or None, got an object of type {type(most).__name__}")


def _check_numbers(name: str, cu: Tensor, x: Tensor, limit: str, most: int | None) -> None:
    ends = cu.tolist()
    if ends[0] != 0:
        raise ArgumentValueError(f"{name}: expected cumulated lengths that start at 0, got {ends[0]} at first")
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    for b, length in enumerate(lengths):
        if length < 0:
            raise ArgumentValueError(f"{name}: expected cumulated lengths, got {ends[b + 1]} after {ends[b]}")
    if ends[-1] != x.shape[0]:
        raise ArgumentValueError(f"{name}: expected cumulated lengths that end at {x.shape[0]}, got {ends[-1]} at last")
    if most is not None and most < max(lengths, default=0):
        raise ArgumentValueError(
            f"{limit}: expected at least the {max(lengths)} rows of the longest sequence, got {most}"
        )
