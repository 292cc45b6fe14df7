"""The public functions: signatures, documentation, checks, autocast, and the views that the operators take."""

from typing import Any, Literal

import torch
from torch import Tensor

from . import _torch, call_forms, checks, partial
from .canonical import canonical
from .dispatch import derivatives, fast_path, func_jvp, func_vmap
from .dispatch.schema import FORWARD, FORWARD_JVP
from .operands import Operands, Options
from .serving import serving

Maybe = Tensor | None


def attention(
    q: Maybe = None,
    k: Maybe = None,
    v: Maybe = None,
    attn_mask: Maybe = None,
    dropout_p: float | Tensor = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    precision: Literal["high"] | None = None,
    backend: str | None = None,
    layout: str = "bhmd",
    query: Maybe = None,
    key: Maybe = None,
    value: Maybe = None,
) -> Tensor:
    """Scaled dot product attention that is right under every derivative: a drop-in for PyTorch's.

    With c the scale and bias the mask, over keys n, for each batch entry and head::

        S = c * q @ k.T + bias      P = softmax(S)      o = P @ v

    The signature, its positions and their meaning are those of `torch.nn.functional.scaled_dot_product_attention`;
    q, k and v may be given by its names, `query`, `key` and `value`, too.
    Memory is linear in M and N, since the scores are never held whole (but for the reference backend).

    Args:
        q: queries [*batch, Hq, M, D], or [M, D] for one head. D of at most 256 on triton. float16, bfloat16, float32,
            or float64 (not on triton). Any strides: packed qkv views cost nothing, a last stride other than 1 one copy.
            On Hopper GPUs other tensors may be copied, too, which is warned of once: `flashjvp.explain` says which.
        k: keys [*batch, Hkv, N, D]; the dtype and device of q.
        v: values [*batch, Hkv, N, Dv], Dv of at most 256 on triton; the dtype and device of q. Batch dims, aligned at
            the right, broadcast across q, k, v, and so do heads: equal numbers, or 1 (for other numbers see
            `enable_gqa`). Any size may be 0: without keys o is zeros, with D = 0 the mean of v.
        attn_mask: a tensor on q's device that broadcasts, aligned at the right, to [*batch, Hq, M, N]. bool: True = the
            key takes part. float32 or q's dtype: added to S after scaling, in its unit (nats); any finite number, also
            -1e9 for all keys of a query, or -inf. Or a causal bias of `torch.nn.attention.bias`. Or a `BlockMask` of
            `torch.nn.attention.flex_attention` of M queries and N keys on q's device: blocks that it does not list cost
            nothing. Its function is evaluated once for each such object, in blocks that are not full.
        dropout_p: a probability p in [0, 1]. Above 0, P @ v is (Z * P / (1 - p)) @ v, Z drawn by PyTorch's generator of
            the device: after `torch.manual_seed` the same on every backend. A 0-dim tensor is read, as for `scale`.
        is_causal: True lets query m see keys n <= m only, aligned at the top left also where M != N. With `attn_mask`
            given too, both apply (an extension: PyTorch documents an error).
        scale: c, a finite real number without unit; None = D**-0.5. A 0-dim tensor on the CPU, or on q's device, is
            read, which waits for the device that it is on; it must have no gradient and no tangent.
        enable_gqa: True lets Hq be a multiple of Hkv: query head h takes part with key head h // (Hq // Hkv). k and v
            may have different numbers, which are then repeated in memory to the least common multiple.
        window: (left, right), as flash_attn has it: query m sees keys m + N - M - left <= n <= m + N - M + right, so
            that the last query is aligned with the last key. None or -1 does not bound a side. Applies together with
            `is_causal` (which is aligned at the top left) and `attn_mask`. Keys outside of it cost nothing.
        precision: None, or "high" for half types: o is float32, and products have operands of 11 significant bits. For
            large scores, where errors of gradients through a tangent grow (docs/numerics.md). Other types are computed
            as with None. Not beside a window or a block mask.
        backend: "triton", "tiled" (plain PyTorch, tile by tile), "reference" (dense, O(M N) memory), or None = triton
            on a GPU, for a dtype and head dims that it supports, else tiled. A backend asked for by name serves the
            call or raises.
        layout: "bhmd", or "bmhd" for q, k and v that are [*batch, rows, H, D]: they are viewed, not copied. o is then
            [*batch, M, Hq, Dv]. The mask stays as it is, and errors speak of shapes with heads before rows.
        query: another name of q.
        key: another name of k.
        value: another name of v.

    Returns:
        o [*batch, Hq, M, Dv] ([M, Dv] where q, k, v have two dims), of q's dtype (but see `precision`) and device, its
        head and row dims in the order that q has them in memory. Zeros for a query that may see no key.

    Derivatives:
        Reverse mode (`backward`, `torch.func.grad`) in q, k, v and a float `attn_mask`, whose gradient takes the
        memory of the mask. Forward mode (`torch.func.jvp`, `torch.autograd.forward_ad`) in any subset of them, in one
        launch that gives o and its tangent; then reverse mode through both together, to inputs and tangents, in one
        backward launch. None in `scale`. Z of dropout is the same in all of them.

    Raises:
        ArgumentTypeError: (a TypeError) a wrong Python type or dtype, dtypes that differ, or a tensor of q, k and v
            that is missing or came by both of its names.
        ArgumentValueError: (a ValueError) shapes that do not fit, devices that differ, a value out of range.
        UnsupportedError: (a NotImplementedError) a scale or dropout_p that needs a gradient or has a tangent,
            a sparse or nested tensor, a call that the backend asked for cannot serve, a precision beside a window.
        SecondOrderError: (an UnsupportedError) a derivative beyond one JVP followed by one backward pass.

    Numerics:
        float16 and bfloat16: P is rounded to the input dtype before P @ v, everything else is float32. float32: IEEE
        products, TF32 only where `torch.backends.cuda.matmul` allows it; factors of products then have 11 significant
        bits, sums are float32. For that, the kernels for Hopper GPUs read float16 copies with per-tensor scaling: these
        take half the bytes of the inputs while a pass runs, rows may be 2^-100 to 2^100 long, and those far shorter
        than the longest one of their tensor lose digits. float64: float64 throughout.
        Under `torch.autocast` float16, bfloat16 and float32 inputs are cast to its dtype; float64 inputs, boolean masks
        and float32 masks are left alone.

    Source:
        FlashAttention-2 (arXiv 2307.08691); flashjvp/kernels/MATH.md (1)-(3), (9)-(17), TF32 (21)-(23), (24)-(33).
    """
    if query is not None or key is not None or value is not None:
        q, k, v = call_forms.by_either_name(q, k, v, query, key, value)
    if layout != "bhmd":
        q, k, v = call_forms.heads_first(layout, q=q, k=k, v=v)
        return attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, window=window, precision=precision,
            backend=backend,
        ).transpose(-2, -3)  # fmt: skip
    if not (type(dropout_p) is float and (scale is None or type(scale) is float)):
        dropout_p, scale = call_forms.number("dropout_p", dropout_p, q), call_forms.number("scale", scale, q)
    served_by, block_mask = backend, None
    if not (window is None and precision is None and (attn_mask is None or type(attn_mask) is Tensor)):
        served_by, attn_mask, is_causal, block_mask = serving(
            q, k, attn_mask, is_causal, window, precision, backend
        )  # fmt: skip
    given, options = (q, k, v, attn_mask, None), (is_causal, scale, served_by)
    is_dropped, is_transformed = type(dropout_p) is not float or dropout_p != 0.0, _torch.transforms_active()
    if not (is_transformed or is_dropped) and (run := fast_path.find(FORWARD, given, options, enable_gqa)):
        if block_mask is not None:  # plans of other entries may be as long
            partial.check_entries(block_mask, q)
        o: Tensor = run(given)[0]
        return o
    if is_transformed and block_mask is None:
        rest: dict[str, Any] = {
            "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "window": window, "precision": precision,
            "backend": backend,
        }  # fmt: skip
        result: Tensor | None = func_jvp.under_jvp(attention_jvp, (q, k, v), attn_mask, dropout_p=dropout_p, **rest)
        if result is None and not is_dropped:
            result = func_vmap.under_vmap(attention, (q, k, v), attn_mask=attn_mask, **rest)
        if result is not None:
            return result
    checks.options(dropout_p, is_causal, scale, enable_gqa)
    operands = Operands._make((q, k, v, None, None, None, attn_mask, None, None))
    operands = _seeded(_canonical(operands, enable_gqa, backend, block_mask), dropout_p)
    o = derivatives.attention(operands, Options(is_causal, _scale(scale), served_by, float(dropout_p)))
    if operands.seed is None:
        fast_path.keep(FORWARD, given, options, enable_gqa, operands.plain)
    return _result(o, operands, q, k, v)


def attention_jvp(
    q: Maybe = None,
    k: Maybe = None,
    v: Maybe = None,
    q_t: Maybe = None,
    k_t: Maybe = None,
    v_t: Maybe = None,
    attn_mask: Maybe = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    attn_mask_t: Maybe = None,
    dropout_p: float | Tensor = 0.0,
    window: tuple[int | None, int | None] | None = None,
    precision: Literal["high"] | None = None,
    backend: str | None = None,
    layout: str = "bhmd",
    query: Maybe = None,
    key: Maybe = None,
    value: Maybe = None,
) -> tuple[Tensor, Tensor]:
    """Scaled dot product attention and its Jacobian-vector product, with explicit tangents.

    With c the scale and bias the mask, over keys n, for each batch entry and head::

        S   = c * q @ k.T + bias                P  = softmax(S)         o   = P @ v
        S_t = c * (q_t @ k.T + q @ k_t.T)       mu = rowsum(P * S_t)    o_t = (P * (S_t - mu)) @ v + P @ v_t

    Both come from one launch, in memory linear in M and N (but for the reference backend). The result is that of
    `torch.func.jvp(attention, (q, k, v), (q_t, k_t, v_t))`, from an ordinary function of tensors, in which
    torch.compile, activation checkpointing and FSDP see nothing unusual.

    Args:
        q: queries [*batch, Hq, M, D], or [M, D] for one head; sizes, dtypes and strides as in `attention`.
        k: keys [*batch, Hkv, N, D]; the dtype and device of q.
        v: values [*batch, Hkv, N, Dv]; the dtype and device of q. Batch dims and heads broadcast likewise.
        q_t: tangent of q, in q's unit per unit of the variable of differentiation: the shape (before broadcasting),
            dtype and device of q, with strides of its own. None = zero, and costs nothing.
        k_t: tangent of k, likewise.
        v_t: tangent of v, likewise.
        attn_mask: as in `attention`: bool (True = take part), float32 or q's dtype (added to S), a causal bias, or a
            `BlockMask`.
        is_causal: as in `attention`: n <= m, aligned at the top left; applies together with `attn_mask`.
        scale: as in `attention`: c, a finite real number without unit; None = D**-0.5. It has no tangent.
        enable_gqa: as in `attention`: True lets Hq be a multiple of Hkv.
        attn_mask_t: tangent of a float `attn_mask`, of its shape, dtype and device, which S_t gets added. None = zero.
        dropout_p: as in `attention`: o_t is then the tangent of the o that is returned.
        window: as in `attention`: (left, right), the keys around a query that it sees.
        precision: as in `attention`: None, or "high", with which o and o_t are float32 for half types, too.
        backend: as in `attention`: "triton", "tiled", "reference" or None.
        layout: as in `attention`: "bhmd" or "bmhd", of q, k, v, their tangents, o and o_t.
        query: another name of q.
        key: another name of k.
        value: another name of v.

    Returns:
        o and o_t, each [*batch, Hq, M, Dv] ([M, Dv] where q, k, v have two dims), of q's dtype (but see `precision`)
        and device, laid out like q; o_t in o's unit per unit of the variable of differentiation. Both are zero for a
        query that may see no key, and o_t is zero when no tangent is given.

    Derivatives:
        Reverse mode in q, k, v, a float mask and all tangents, through o and o_t together, in one backward launch.
        Forward mode would be a second JVP, and raises. None in `scale`.

    Raises:
        ArgumentTypeError: as `attention`, and for a tangent of another dtype.
        ArgumentValueError: as `attention`, and for a tangent without its primal's shape or on another device.
        UnsupportedError: as `attention`.
        SecondOrderError: forward mode, or reverse mode through the gradients.

    Numerics:
        float16 and bfloat16: P and P * S_t are rounded to the input dtype before their products, in the backward pass
        dS and dS_t too; everything else is float32. float32, float64 and `torch.autocast`, which casts tangents with
        their primals, as in `attention`; in TF32 tangents and cotangents are rounded, and copied, as q, k and v are.
        Two runs give the same bits, but for d_q and d_q_t of long sequences of a head dim above 64 on Hopper GPUs,
        unless `torch.are_deterministic_algorithms_enabled()`.

    Source:
        FlashAttention-2 (arXiv 2307.08691) for the streaming softmax; flashjvp/kernels/MATH.md (1)-(33).
    """
    if query is not None or key is not None or value is not None:
        q, k, v = call_forms.by_either_name(q, k, v, query, key, value)
    if layout != "bhmd":
        q, k, v, q_t, k_t, v_t = call_forms.heads_first(layout, q=q, k=k, v=v, q_t=q_t, k_t=k_t, v_t=v_t)
        o, o_t = attention_jvp(
            q, k, v, q_t, k_t, v_t, attn_mask, is_causal, scale, enable_gqa, attn_mask_t=attn_mask_t,
            dropout_p=dropout_p, window=window, precision=precision, backend=backend,
        )  # fmt: skip
        return o.transpose(-2, -3), o_t.transpose(-2, -3)
    if not (type(dropout_p) is float and (scale is None or type(scale) is float)):
        dropout_p, scale = call_forms.number("dropout_p", dropout_p, q), call_forms.number("scale", scale, q)
    served_by, block_mask = backend, None
    if not (window is None and precision is None and (attn_mask is None or type(attn_mask) is Tensor)):
        served_by, attn_mask, is_causal, block_mask = serving(
            q, k, attn_mask, is_causal, window, precision, backend
        )  # fmt: skip
    given, options = (q, k, v, q_t, k_t, v_t, attn_mask, attn_mask_t, None), (is_causal, scale, served_by)
    is_dropped, is_transformed = type(dropout_p) is not float or dropout_p != 0.0, _torch.transforms_active()
    if not (is_transformed or is_dropped) and (run := fast_path.find(FORWARD_JVP, given, options, enable_gqa)):
        if block_mask is not None:  # plans of other entries may be as long
            partial.check_entries(block_mask, q)
        o, o_t, _, _ = run(given)
        return o, o_t
    if is_transformed and block_mask is None and not is_dropped:
        results: tuple[Tensor, Tensor] | None = func_vmap.under_vmap(
            attention_jvp, (q, k, v, q_t, k_t, v_t), attn_mask=attn_mask, attn_mask_t=attn_mask_t, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa, window=window, precision=precision, backend=backend,
        )  # fmt: skip
        if results is not None:
            return results
    checks.options(dropout_p, is_causal, scale, enable_gqa)
    operands = _seeded(_canonical(Operands._make(given), enable_gqa, backend, block_mask), dropout_p)
    # mutate: o, o_t
    o, o_t = derivatives.attention_jvp(operands, Options(is_causal, _scale(scale), served_by, float(dropout_p)))
    if operands.has_tangents and operands.seed is None:
        fast_path.keep(FORWARD_JVP, given, options, enable_gqa, operands)
    return _result(o, operands, q, k, v), _result(o_t, operands, q, k, v)


def _canonical(x: Operands, enable_gqa: bool, backend: str | None, block_mask: Any) -> Operands:
    """Checked operands, as operators take them. In place of a block mask its plan is among them."""
    if block_mask is None:
        return canonical(x, enable_gqa, backend)
    plan = x.mask
    x = canonical(x._replace(mask=None), enable_gqa, backend)
    partial.check_entries(block_mask, x.q)
    return x._replace(mask=plan)


def _result(o: Tensor, operands: Operands, q: Any, k: Any, v: Any) -> Tensor:
    """Operators take a head dim and at least one column of v; the public functions also tensors without."""
    if operands.v.shape[-1] != v.shape[-1]:
        o = o[..., : v.shape[-1]]
    return o.squeeze(0) if q.ndim == k.ndim == v.ndim == 2 else o


def _scale(scale: Any) -> float | None:
    """Operators take a float; the public functions any real number."""
    return scale if scale is None else float(scale)


def _seeded(x: Operands, dropout_p: Any) -> Operands:
    """Adds a seed of the device's default generator where there is dropout. Nothing waits for the device."""
    if dropout_p == 0.0:
        return x
    return x._replace(seed=torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.q.device))
