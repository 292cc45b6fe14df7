"""Per-tensor scaling: where TF32 is allowed, float32 tensors are turned into float16 tensors times powers of two. With
precision="high" (backends/high.py) tensors of half types are, too; float16 has all the bits of a bfloat16 number.

A TF32 product rounds its operands to 11 significant bits. float16 has as many, and tensor cores multiply it twice as
fast, but it has few exponents. So every tensor is divided by a power of two, its scale, which is measured: no row of q
is then longer than 2^LONGEST_QK, and so on. The scales are u_q, u_k, u_v and u_do; those of q_t, k_t and v_t are u_q r,
u_k r and u_v r, and that of d_o_t is u_do / r, with one power of two r. All terms of a sum, such as G v.T + T v_t.T,
then have the same scale. The kernels see only two differences: the softmax scale is u_q u_k times as large, and each
result is multiplied by its own scale when it is written (scales.py). MATH.md (21)-(23).

r is the least with |S_t| <= 2 after scaling, as |q_t| |k| + |q| |k_t| bound it, and v_t no longer than v may be; in the
backward also with d_o_t as long as d_o: the gradients of tangents depend on d_o_t alone, however short it is. With
P * 2^9 for P, all that is rounded to float16 then stays below 2^15: |A - a| <= 8, |S_t - mu| <= 4, |B - delta| <= 32.
Rows of gradients differ more in length than those of v: they have the larger part of the room that A and B leave.

Where q and k are short, with scores below 2^-7, their scales are larger, so that q_t and k_t stay below 2^15, too. In
the forward v may be longer, so that v_t keeps its digits beside an S_t of 10^4 that P (S_t - mu) leaves nothing of.

Of half types q and k are exact, and what is lost of v_t and d_o beside a large S_t would be most of the error: there
r is 0 up to |S_t| = 2^10, in the forward 2^14, and d_o and d_o_t make room for it; MATH.md (22').

A number has 11 bits down to 2^-14 and below loses them one by one: of v in rows 2^-8 times as long as the longest one
(for D = 64), of d_o 2^-16, of q and k 2^-19. Where a large S_t or v_t sets r, the other one and d_o lose some earlier.
Rows between 2^-100 and 2^100 long are served; infinite ones give NaN. Powers of two lose nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...operands import Inputs
from ..launch.call import Call, Maybe
from ..tiles import load_rows, scale_rows, select_head, store_rows
from . import scales
from .scales import (
    D_K,
    D_K_T,
    D_Q,
    D_Q_T,
    D_V,
    D_V_T,
    INVERSE_MU,
    INVERSE_O,
    INVERSE_O_T,
    KEY_SIDE,
    MU,
    O_T,
    QUERY_SIDE,
    SOFTMAX_SCALE,
    O,
)

LONGEST_QK = tl.constexpr(8)  # log2 of the greatest length of a row of q and of k, unless scores are small
_NONE = tl.constexpr(-1000)  # stands for the exponent of zeros
_SHORTER = tl.constexpr(6)  # of half types: log2 of how much shorter v may be than v_t, and d_o_t than d_o
_ROWS = 64  # of a program


class Room(NamedTuple):
    """How the range of float16 is divided: log2 of the greatest length of a row of v, likewise of d_o and d_o_t beside
    |S_t| <= 2, of the greatest |S_t|, and of what P is multiplied by, in which float16 would lose digits: it is one
    over the number of keys on average."""

    v: int
    G: int
    s_t: int
    p_exponent: int


FORWARD, BACKWARD = Room(12, 0, 1, 0), Room(-3, 5, 1, 9)
FORWARD_OF_HALF, BACKWARD_OF_HALF = Room(12, 0, 14, 0), Room(5, 4, 10, 5)


class KernelOperands(NamedTuple):
    """A call with the tensors that the kernels read and, if these were scaled, the scales: float32 [COUNT]."""

    call: Call
    inputs: Inputs
    cotangents: tuple[Maybe, ...]  # of o and o_t
    tensor_scales: Maybe = None
    p_exponent: int = 0


def scale_tensors(call: Call, inputs: Inputs, cotangents: tuple[Maybe, ...], scale: float) -> KernelOperands:
    """The call with contiguous float16 tensors, divided by their scales, in place of those given; None stays None."""
    q, k, v, q_t, k_t, v_t = inputs
    d_o, d_o_t = cotangents or (None, None)
    query_side, key_side = (q, q_t, d_o, d_o_t), (k, v, k_t, v_t)
    norms = q.new_zeros(8, dtype=torch.int32)
    tensor_scales = q.new_empty(scales.COUNT, dtype=torch.float32)
    of_rows: dict[str, Any] = {"stages": 1, "ROWS": _ROWS}
    query_programs, key_programs = call.query_programs(_ROWS), call.key_programs(_ROWS)
    queries, keys = call.operands(*query_side), call.operands(*key_side)
    call.launch(row_norms_kernel, "row_norms", query_programs, (*queries, norms), scale, KEYS=False, **of_rows)
    call.launch(row_norms_kernel, "row_norms", key_programs, (*keys, norms), scale, KEYS=True, **of_rows)
    is_half = q.dtype != torch.float32  # mutate: is_half
    rooms = (FORWARD_OF_HALF, BACKWARD_OF_HALF) if is_half else (FORWARD, BACKWARD)
    room = rooms[len(cotangents) > 0]
    longest: dict[str, Any] = {
        "LONGEST_V": room.v, "LONGEST_G": room.G, "LONGEST_S_T": room.s_t, "P_EXPONENT": room.p_exponent
    }  # fmt: skip
    call.launch(scales_kernel, "tensor_scales", 1, (norms, tensor_scales), scale, stages=1, **longest)
    scaled_q, scaled_k = tuple(map(_empty_half, query_side)), tuple(map(_empty_half, key_side))
    args = (*queries, *call.operands(*scaled_q), tensor_scales)
    call.launch(scale_kernel, "scale_tensors", query_programs, args, scale, KEYS=False, **of_rows)
    args = (*keys, *call.operands(*scaled_k), tensor_scales)
    call.launch(scale_kernel, "scale_tensors", key_programs, args, scale, KEYS=True, **of_rows)
    q, q_t, d_o, d_o_t = scaled_q
    k, v, k_t, v_t = scaled_k
    assert q is not None and k is not None and v is not None
    half = Call(q, k, v, call.mask_tensor, call.is_causal)
    return KernelOperands(half, Inputs(q, k, v, q_t, k_t, v_t), (d_o, d_o_t), tensor_scales, room.p_exponent)


def _empty_half(x: Maybe) -> Maybe:
    return None if x is None else x.new_empty(x.shape, dtype=torch.float16)


@triton.jit
def _block_of(M, N, heads, group, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """(batch, head, first row, all rows) of a program for ROWS rows of queries, or of keys."""
    rows = N if KEYS else M
    heads = heads // group if KEYS else heads
    tiles = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    return pid // tiles // heads, (pid // tiles) % heads, (pid % tiles) * ROWS, rows


@triton.jit
def _raise_to_longest(norms, x, first, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REGULAR: tl.constexpr):
    """Raises a norm, kept as the bits of a float32 number, to that of the longest row here."""
    if len(x) > 0:
        tile = load_rows(x, first, rows, ROWS, COLUMNS, REGULAR)
        longest = tl.max(tl.abs(tile[0].to(tl.float32)), 1)
        for i in tl.static_range(1, len(tile)):
            longest = tl.maximum(longest, tl.max(tl.abs(tile[i].to(tl.float32)), 1))
        unit = tl.maximum(longest, 1e-30)  # so that no square leaves the range of float32
        total = tl.sum((tile[0] / unit[:, None]) * (tile[0] / unit[:, None]), 1)
        for i in tl.static_range(1, len(tile)):
            total += tl.sum((tile[i] / unit[:, None]) * (tile[i] / unit[:, None]), 1)
        norm = tl.max(unit * tl.sqrt(total), 0)
        tl.atomic_max(norms, norm.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["M", "N", "heads"])
def row_norms_kernel(
    x0, x1, x2, x3, norms, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: the longest of some rows of q, q_t, d_o, d_o_t, or of k, v, k_t, v_t. An absent one is None."""
    batch, head, first, rows = _block_of(M, N, heads, group, ROWS, KEYS)
    place = norms + (4 if KEYS else 0)
    SECOND: tl.constexpr = V_COLUMNS if KEYS else K_COLUMNS
    THIRD: tl.constexpr = K_COLUMNS if KEYS else V_COLUMNS
    _raise_to_longest(place, select_head(x0, batch, head, batch_shape, REGULAR), first, rows, ROWS, K_COLUMNS, REGULAR)
    _raise_to_longest(place + 1, select_head(x1, batch, head, batch_shape, REGULAR), first, rows, ROWS, SECOND, REGULAR)
    _raise_to_longest(place + 2, select_head(x2, batch, head, batch_shape, REGULAR), first, rows, ROWS, THIRD, REGULAR)
    _raise_to_longest(
        place + 3, select_head(x3, batch, head, batch_shape, REGULAR), first, rows, ROWS, V_COLUMNS, REGULAR
    )


@triton.jit
def _exponent(bits):
    """The least e with x < 2^e, from -100 to 100, for the bits of a positive float32 x; _NONE for 0."""
    return tl.where(bits == 0, _NONE, tl.minimum(tl.maximum((bits >> 23) - 126, -100), 100))


@triton.jit
def _unless_none(e, other):
    """e, or the other exponent where the tensor is zero and any would do."""
    return tl.where(e > _NONE, e, tl.where(other > _NONE, other, 0))


@triton.jit
def _power(e):
    """2^e, from 2^-126 to 2^127."""
    return ((tl.minimum(tl.maximum(e, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def scales_kernel(
    norms, tensor_scales, scale, batch_shape, M, N, heads, group,
    LONGEST_V: tl.constexpr, LONGEST_G: tl.constexpr, LONGEST_S_T: tl.constexpr, P_EXPONENT: tl.constexpr,
):  # fmt: skip
    """One program: all scales, as exponents of two: u of a tensor and u + r of its tangent."""
    norm_q_t, norm_k_t = _exponent(tl.load(norms + 1)), _exponent(tl.load(norms + 6))
    norm_v_t, norm_G = _exponent(tl.load(norms + 7)), _exponent(tl.load(norms + 2))
    norm_T = _exponent(tl.load(norms + 3))
    norm_q = _unless_none(_exponent(tl.load(norms)), norm_q_t)
    norm_k = _unless_none(_exponent(tl.load(norms + 4)), norm_k_t)
    norm_v = _unless_none(_exponent(tl.load(norms + 5)), norm_v_t)
    scores = _exponent(tl.full([], scale, tl.float32).to(tl.int32, bitcast=True)) + norm_q + norm_k
    longest = tl.minimum(tl.maximum(scores + 15, 0), LONGEST_QK)
    u_q, u_k, u_v = norm_q - longest, norm_k - longest, norm_v - LONGEST_V
    softmax_scale = tl.maximum(scale * _power(u_q + u_k), 1e-30)  # mutate: softmax_scale
    # |S_t| <= 2 divided by 2^r, but q_t and k_t below 2^15.
    r = tl.maximum(norm_q_t - norm_q, norm_k_t - norm_k) + tl.maximum(scores, longest - 15)
    r = tl.maximum(r, norm_v_t - norm_v)
    r = tl.where(r > _NONE // 2, r, 0)  # tangents, if there are any, are zeros
    more = 0  # than 2 that |S_t| may be, as a power of two
    if LONGEST_S_T > 1:
        s_t = scores - norm_q - norm_k  # |S_t| <= 2^(s_t + 1), also where q or k are zeros
        s_t += tl.maximum(norm_q_t + _exponent(tl.load(norms + 4)), _exponent(tl.load(norms)) + norm_k_t)
        least = tl.maximum(s_t + 1 - LONGEST_S_T, tl.maximum(norm_q_t - u_q, norm_k_t - u_k) - 15)
        r = tl.maximum(tl.minimum(r, 0), tl.maximum(least, norm_v_t - norm_v - _SHORTER))
        r = tl.where(norm_T > _NONE, tl.maximum(r, norm_G - norm_T - _SHORTER), r)
        u_v, more = tl.maximum(norm_v, norm_v_t - r) - LONGEST_V, tl.maximum(s_t - r, 0)
    else:
        r = tl.where(norm_T > _NONE, tl.maximum(r, norm_G - norm_T), r)
    u_do = tl.maximum(norm_G, norm_T + r)
    u_do = tl.where(u_do > _NONE // 2, u_do, 0) - LONGEST_G + more
    u_do_t = u_do - r

    tl.store(tensor_scales + SOFTMAX_SCALE, softmax_scale)
    tl.store(tensor_scales + O, _power(u_v))
    tl.store(tensor_scales + O_T, _power(u_v + r))  # mutate: tl.store (1)
    tl.store(tensor_scales + MU, _power(r))  # mutate: tl.store (2)
    tl.store(tensor_scales + D_Q, _power(u_do + u_v - u_q - P_EXPONENT))
    tl.store(tensor_scales + D_K, _power(u_do + u_v - u_k - P_EXPONENT))
    tl.store(tensor_scales + D_V, _power(u_do - P_EXPONENT))  # mutate: tl.store (3)
    tl.store(tensor_scales + D_Q_T, _power(u_do_t + u_v - u_q - P_EXPONENT))  # mutate: tl.store (4)
    tl.store(tensor_scales + D_K_T, _power(u_do_t + u_v - u_k - P_EXPONENT))
    tl.store(tensor_scales + D_V_T, _power(u_do_t - P_EXPONENT))
    tl.store(tensor_scales + INVERSE_MU, _power(-r))
    tl.store(tensor_scales + INVERSE_O, _power(-u_v))
    tl.store(tensor_scales + INVERSE_O_T, _power(-u_v - r))
    tl.store(tensor_scales + QUERY_SIDE, _power(-u_q))
    tl.store(tensor_scales + QUERY_SIDE + 1, _power(-u_q - r))
    tl.store(tensor_scales + QUERY_SIDE + 2, _power(-u_do))
    tl.store(tensor_scales + QUERY_SIDE + 3, _power(-u_do_t))
    tl.store(tensor_scales + KEY_SIDE, _power(-u_k))
    tl.store(tensor_scales + KEY_SIDE + 1, _power(-u_v))  # mutate: tl.store (5)
    tl.store(tensor_scales + KEY_SIDE + 2, _power(-u_k - r))  # mutate: tl.store (6)
    tl.store(tensor_scales + KEY_SIDE + 3, _power(-u_v - r))


@triton.jit
def _scale(operand, factor, first, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REGULAR: tl.constexpr):
    x, out = operand
    if len(x) > 0:
        tile = load_rows(x, first, rows, ROWS, COLUMNS, REGULAR)
        tile = scale_rows(tile, tl.full([ROWS], tl.load(factor), tl.float32))
        store_rows(out, tile, first, rows, COLUMNS, REGULAR)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def scale_kernel(
    x0, x1, x2, x3, out0, out1, out2, out3, tensor_scales, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: some rows of q, q_t, d_o and d_o_t, or of k, v, k_t and v_t, divided by their scales."""
    batch, head, first, rows = _block_of(M, N, heads, group, ROWS, KEYS)
    factor = tensor_scales + (KEY_SIDE if KEYS else QUERY_SIDE)
    a = select_head(x0, batch, head, batch_shape, REGULAR), select_head(out0, batch, head, batch_shape, REGULAR)
    b = select_head(x1, batch, head, batch_shape, REGULAR), select_head(out1, batch, head, batch_shape, REGULAR)
    c = select_head(x2, batch, head, batch_shape, REGULAR), select_head(out2, batch, head, batch_shape, REGULAR)
    d = select_head(x3, batch, head, batch_shape, REGULAR), select_head(out3, batch, head, batch_shape, REGULAR)
    _scale(a, factor, first, rows, ROWS, K_COLUMNS, REGULAR)
    _scale(b, factor + 1, first, rows, ROWS, V_COLUMNS if KEYS else K_COLUMNS, REGULAR)
    _scale(c, factor + 2, first, rows, ROWS, K_COLUMNS if KEYS else V_COLUMNS, REGULAR)
    _scale(d, factor + 3, first, rows, ROWS, V_COLUMNS, REGULAR)
