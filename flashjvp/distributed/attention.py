"""The public functions: attention, and attention with its JVP, of a sequence that is divided over processes."""

from typing import Any

import torch
from torch import Tensor

from .. import _torch, api, call_forms, checks
from ..canonical import canonical
from ..dispatch import derivatives
from ..errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from ..operands import Operands, Options
from . import dtensor
from .local import NO_LEARNED_MASK
from .sharding import Sharding

Maybe = Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: Sharding | None = None,
    *,
    attn_mask: Maybe = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`flashjvp.attention` of a sequence that is divided over processes, each of which gives and gets its own rows.

    With c the scale and bias the mask, over all keys n of all processes, for each batch entry and head::

        S = c * q @ k.T + bias      P = softmax(S)      o = P @ v

    The processes of a sharding make the same calls in the same order, with the same arguments but for the numbers of
    rows. They use the same results in their losses, and run the backward pass as often: their messages belong together.

    Args:
        q: this process's queries [*batch, Hq, rows, D]; dtypes, strides and broadcasting as in `flashjvp.attention`.
            Or a DTensor, with k, v and tangents of the same mesh and placements: sharded on batch dims or heads, each
            process computes its own; on the rows (of one mesh dim), that mesh dim is the ring.
        k: this process's keys [*batch, Hkv, key rows, D]; the dtype and device of q.
        v: this process's values [*batch, Hkv, key rows, Dv]; the dtype and device of q.
        sharding: how the sequence is divided, which says how many rows each process has; None for DTensors.
        attn_mask: with this process's rows and a column for each key of the whole sequence, in its order: it broadcasts
            to [*batch, Hq, rows, N]. bool: True = the key takes part. float32 or q's dtype: added to S; it has neither
            a tangent nor a gradient. With Ulysses it has one row, and with DTensors there is none.
        is_causal: True lets the query at position m of the whole sequence see keys n <= m. With zigzag, all processes
            have the same work.
        scale: c, as in `flashjvp.attention`; None = D**-0.5.
        enable_gqa: True lets Hq be a multiple of Hkv, as in `flashjvp.attention`.
        backend: what computes on each process, as in `flashjvp.attention`; None = the best one.

    Returns:
        o [*batch, Hq, rows, Dv], of q's dtype and device; a DTensor with q's placements if q is one.

    Derivatives:
        Those of `flashjvp.attention` in q, k and v: reverse mode, forward mode (`torch.func.jvp`,
        `torch.autograd.forward_ad`), and reverse mode through both together. In reverse mode gradients are those of the
        sum of all processes' losses. None in `attn_mask`.

    Raises:
        ArgumentTypeError: as `flashjvp.attention`, and for a sharding that is none.
        ArgumentValueError: as `flashjvp.attention`, and for other numbers of rows than the sharding gives this process.
        UnsupportedError: as `flashjvp.attention`; a float mask with a gradient or a tangent, a mask of several rows
            with Ulysses, a mask with DTensors, placements of DTensors that no one of these serves.
        SecondOrderError: as `flashjvp.attention`.

    Numerics:
        Those of `flashjvp.attention` for each block. Blocks are merged, and their gradients summed, in float32 (float64
        for float64). In half types the o, o_t and gradients of each block are rounded to that type before, and so is
        what a process sends of another's gradients.

    Source:
        Ring attention (arXiv 2310.01889), Ulysses (arXiv 2309.14509); flashjvp/kernels/MATH.md (8), sections 3 and 4.
    """
    if (found := dtensor.local((q, k, v), sharding, attn_mask)) is not None:
        q, k, v = found.tensors
        o = attention(
            q, k, v, found.sharding, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, backend=backend
        )  # fmt: skip
        return found.whole(o)
    operands = Operands(q, k, v, None, None, None, attn_mask)
    scale = call_forms.number("scale", scale, q)
    operands, options = _checked(operands, sharding, is_causal, scale, enable_gqa, backend)
    return api._result(derivatives.attention(operands, options), operands, q, k, v)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Maybe = None,
    k_t: Maybe = None,
    v_t: Maybe = None,
    sharding: Sharding | None = None,
    *,
    attn_mask: Maybe = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashjvp.attention_jvp` of a sequence that is divided over processes, each with its own rows.

    With c the scale and bias the mask, over all keys n of all processes, for each batch entry and head::

        S   = c * q @ k.T + bias                P  = softmax(S)         o   = P @ v
        S_t = c * (q_t @ k.T + q @ k_t.T)       mu = rowsum(P * S_t)    o_t = (P * (S_t - mu)) @ v + P @ v_t

    Args:
        q: this process's queries [*batch, Hq, rows, D], or a DTensor, as in `attention`.
        k: this process's keys [*batch, Hkv, key rows, D]; the dtype and device of q.
        v: this process's values [*batch, Hkv, key rows, Dv]; the dtype and device of q.
        q_t: tangent of q, of its shape, dtype and device; None = zero, and costs nothing. On every process or on none.
        k_t: tangent of k, likewise.
        v_t: tangent of v, likewise.
        sharding: as in `attention`.
        attn_mask: as in `attention`.
        is_causal: as in `attention`.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        backend: as in `attention`.

    Returns:
        o and o_t, each [*batch, Hq, rows, Dv], of q's dtype and device; DTensors with q's placements if q is one.

    Derivatives:
        Reverse mode in q, k, v and their tangents, through o and o_t together, in one backward pass; gradients are
        those of the sum of all processes' losses. Forward mode would be a second JVP, and raises.

    Raises:
        ArgumentTypeError: as `attention`.
        ArgumentValueError: as `attention`, and for a tangent without its primal's shape or on another device.
        UnsupportedError: as `attention`.
        SecondOrderError: forward mode, or reverse mode through the gradients.

    Numerics:
        Those of `attention`.

    Source:
        Ring attention (arXiv 2310.01889), Ulysses (arXiv 2309.14509); flashjvp/kernels/MATH.md (8), sections 3 and 4.
    """
    if (found := dtensor.local((q, k, v, q_t, k_t, v_t), sharding, attn_mask)) is not None:
        q, k, v, q_t, k_t, v_t = found.tensors
        o, o_t = attention_jvp(
            q,
            k,
            v,
            q_t,
            k_t,
            v_t,
            found.sharding,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            backend=backend,
        )
        return found.whole(o), found.whole(o_t)
    operands = Operands(q, k, v, q_t, k_t, v_t, attn_mask)
    scale = call_forms.number("scale", scale, q)
    operands, options = _checked(operands, sharding, is_causal, scale, enable_gqa, backend)
    o, o_t = derivatives.attention_jvp(operands, options)
    return api._result(o, operands, q, k, v), api._result(o_t, operands, q, k, v)


def _checked(
    x: Operands, sharding: object, is_causal: Any, scale: Any, enable_gqa: Any, backend: str | None
) -> tuple[Operands, Options]:
    """Operands and options as operators take them; the name of the backend says how the sequence is divided."""
    checks.options(0.0, is_causal, scale, enable_gqa)
    if not isinstance(sharding, Sharding):
        came = f"an object of type {type(sharding).__name__}"
        raise ArgumentTypeError(f"sharding: expected a flashjvp.distributed.Sharding, got {came}")
    operands = canonical(x, enable_gqa, backend, keys=sharding.keys)
    for name, tensor, rows in zip(("q", "k"), (x.q, x.k), sharding.rows, strict=True):
        if tensor.shape[-2] != rows:
            expected = f"{rows} rows, those of this process in {sharding}"
            raise ArgumentValueError(f"{name}: expected {expected}, got shape {list(tensor.shape)}")
    _check_mask(x.mask, sharding)
    return operands, Options(is_causal, None if scale is None else float(scale), sharding.of_backend(backend))


def _check_mask(mask: Maybe, sharding: Sharding) -> None:
    if mask is None:
        return
    is_dual = not torch.compiler.is_compiling() and _torch.carries_tangent(mask)
    if (mask.requires_grad and torch.is_grad_enabled()) or is_dual:
        raise UnsupportedError(NO_LEARNED_MASK)
    if sharding.has_ulysses and mask.ndim > 1 and mask.shape[-2] > 1:
        raise UnsupportedError(
            f"attn_mask: expected one row with Ulysses (the same for all queries), got shape {list(mask.shape)}"
        )
