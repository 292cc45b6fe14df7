"""float32 tensors as float16 ones in units of their own, for the tensor cores of the half types.

Where PyTorch allows TF32, a float32 product may round its factors to 11 significant bits. float16 has as many, and
tensor cores multiply it twice as fast, but few exponents. So q, k, v and d_o are divided by powers of two u that are
measured: then no row of them is longer than MOST_SCORES and so on say. q_t, k_t and v_t are in units of u_q r,
u_k r and u_v r, and d_o_t in units of u_do / r, with one power of two r: what is added up, such as G v.T + T v_t.T, has
one unit, and no kernel knows of any but in its scale (u_q u_k times as large) and in what it writes (scales.py).

r is the least with |S_t| <= 2 in its unit, as |q_t| |k| + |q| |k_t| bound it, and v_t no longer than v may be; in the
backward also with d_o_t as long as d_o: the gradients of tangents depend on d_o_t alone, however short it is. With
P * 2^9 for P, all that is rounded to float16 then stays below 2^15: |A - a| <= 8, |S_t - mu| <= 4, |B - delta| <= 32.
Rows of gradients differ more in length than those of v: they have the larger part of the room that A and B leave.

Of short q and k, with scores below 2^-7, the units are larger, so that q_t and k_t stay below 2^15, too. In the forward
v may be longer, so that v_t keeps its digits beside an S_t of 10^4 that P (S_t - mu) leaves nothing of.

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
from . import scales as places
from .scales import (
    D_K,
    D_K_T,
    D_Q,
    D_Q_T,
    D_V,
    D_V_T,
    MU,
    O_T,
    OF_KEYS,
    OF_QUERIES,
    OWN_MU,
    OWN_O,
    OWN_O_T,
    SHIFT,
    SIGMA,
    O,
)

MOST_SCORES = tl.constexpr(8)  # log2 of the greatest length of a row of q and of k, unless scores are small
MOST_FORWARD, MOST_BACKWARD = (12, 0), (-3, 5)  # likewise of v, and of d_o and d_o_t
_NONE = tl.constexpr(-1000)  # stands for the exponent of zeros
_ROWS = 32  # of a program


class KernelOperands(NamedTuple):
    """A call with the tensors that the kernels read and, if these were rescaled, the factors: float32 [COUNT]."""

    call: Call
    inputs: Inputs
    cotangents: tuple[Maybe, ...]  # of o and o_t
    factors: Maybe = None


def rescale(call: Call, inputs: Inputs, cotangents: tuple[Maybe, ...], scale: float) -> KernelOperands:
    """A call of contiguous float16 tensors in their units, in place of one of float32; what is None stays so."""
    q, k, v, q_t, k_t, v_t = inputs
    d_o, d_o_t = cotangents or (None, None)
    of_queries, of_keys = (q, q_t, d_o, d_o_t), (k, v, k_t, v_t)
    lengths = q.new_zeros(8, dtype=torch.int32)
    factors = q.new_empty(places.COUNT)
    of_rows: dict[str, Any] = {"stages": 1, "ROWS": _ROWS}
    query_programs, key_programs = call.query_programs(_ROWS), call.key_programs(_ROWS)
    queries, keys = call.operands(*of_queries), call.operands(*of_keys)
    call.launch(lengths_kernel, "lengths", query_programs, (*queries, lengths), scale, KEYS=False, **of_rows)
    call.launch(lengths_kernel, "lengths", key_programs, (*keys, lengths), scale, KEYS=True, **of_rows)
    most_v, most_g = MOST_BACKWARD if cotangents else MOST_FORWARD
    call.launch(factors_kernel, "factors", 1, (lengths, factors), scale, stages=1, MOST_V=most_v, MOST_G=most_g)
    halves_q, halves_k = tuple(map(_half, of_queries)), tuple(map(_half, of_keys))
    args = (*queries, *call.operands(*halves_q), factors)
    call.launch(rescale_kernel, "rescale", query_programs, args, scale, KEYS=False, **of_rows)
    args = (*keys, *call.operands(*halves_k), factors)
    call.launch(rescale_kernel, "rescale", key_programs, args, scale, KEYS=True, **of_rows)
    q, q_t, d_o, d_o_t = halves_q
    k, v, k_t, v_t = halves_k
    assert q is not None and k is not None and v is not None
    mask = None if call.mask is None else call.mask.tensor
    return KernelOperands(Call(q, k, v, mask, call.is_causal), Inputs(q, k, v, q_t, k_t, v_t), (d_o, d_o_t), factors)


def _half(x: Maybe) -> Maybe:
    return None if x is None else x.new_empty(x.shape, dtype=torch.float16)


@triton.jit
def _place_of(M, N, heads, group, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Of a program that owns ROWS rows of queries, or of keys: batch, head, first row, all rows."""
    rows = N if KEYS else M
    heads = heads // group if KEYS else heads
    tiles = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    return pid // tiles // heads, (pid // tiles) % heads, (pid % tiles) * ROWS, rows


@triton.jit
def _note_length(lengths, x, first, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REGULAR: tl.constexpr):
    """Raises a length, as the bits of a float32 number, to that of the longest of some rows, if it is shorter."""
    if len(x) > 0:
        tile = load_rows(x, first, rows, ROWS, COLUMNS, REGULAR)
        most = tl.max(tl.abs(tile[0]), 1)
        for i in tl.static_range(1, len(tile)):
            most = tl.maximum(most, tl.max(tl.abs(tile[i]), 1))
        unit = tl.maximum(most, 1e-30)  # so that no square leaves the range of float32
        total = tl.sum((tile[0] / unit[:, None]) * (tile[0] / unit[:, None]), 1)
        for i in tl.static_range(1, len(tile)):
            total += tl.sum((tile[i] / unit[:, None]) * (tile[i] / unit[:, None]), 1)
        length = tl.max(unit * tl.sqrt(total), 0)
        tl.atomic_max(lengths, length.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["M", "N", "heads"])
def lengths_kernel(
    x0, x1, x2, x3, lengths, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: some rows of q, q_t, d_o and d_o_t, or of k, v, k_t and v_t. An absent one is None."""
    batch, head, first, rows = _place_of(M, N, heads, group, ROWS, KEYS)
    place = lengths + (4 if KEYS else 0)
    _note_length(place, select_head(x0, batch, head, batch_shape, REGULAR), first, rows, ROWS, K_COLUMNS, REGULAR)
    _note_length(place + 1, select_head(x1, batch, head, batch_shape, REGULAR), first, rows, ROWS, K_COLUMNS, REGULAR)
    _note_length(place + 2, select_head(x2, batch, head, batch_shape, REGULAR), first, rows, ROWS, K_COLUMNS, REGULAR)
    _note_length(place + 3, select_head(x3, batch, head, batch_shape, REGULAR), first, rows, ROWS, K_COLUMNS, REGULAR)


@triton.jit
def _exponent(bits):
    """The least e with x < 2^e of a positive float32 number's bits, from -100 to 100; _NONE of 0."""
    return tl.where(bits == 0, _NONE, tl.minimum(tl.maximum((bits >> 23) - 126, -100), 100))


@triton.jit
def _unless_none(e, other):
    """An exponent; of zeros, which have any, the other one."""
    return tl.where(e > _NONE, e, tl.where(other > _NONE, other, 0))


@triton.jit
def _power(e):
    """2^e, from 2^-126 to 2^127."""
    return ((tl.minimum(tl.maximum(e, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def factors_kernel(
    lengths, factors, scale, batch_shape, M, N, heads, group,
    MOST_V: tl.constexpr, MOST_G: tl.constexpr,
):  # fmt: skip
    """One program: the factors. Units are exponents of two, u of what is without a tangent and u + r of its tangent.

    MOST_V is the log2 of the greatest length of a row of v, MOST_G that of d_o and d_o_t.
    """
    length_t_q, length_t_k = _exponent(tl.load(lengths + 1)), _exponent(tl.load(lengths + 6))
    length_t_v, length_g = _exponent(tl.load(lengths + 7)), _exponent(tl.load(lengths + 2))
    length_t = _exponent(tl.load(lengths + 3))
    length_q = _unless_none(_exponent(tl.load(lengths)), length_t_q)
    length_k = _unless_none(_exponent(tl.load(lengths + 4)), length_t_k)
    length_v = _unless_none(_exponent(tl.load(lengths + 5)), length_t_v)
    scores = _exponent(tl.full([], scale, tl.float32).to(tl.int32, bitcast=True)) + length_q + length_k
    most = tl.minimum(tl.maximum(scores + 15, 0), MOST_SCORES)
    u_q, u_k, u_v = length_q - most, length_k - most, length_v - MOST_V
    sigma = tl.maximum(scale * _power(u_q + u_k), 1e-30)
    # |S_t| <= 2 in units of 2^r, but q_t and k_t below 2^15.
    r = tl.maximum(length_t_q - length_q, length_t_k - length_k) + tl.maximum(scores, most - 15)
    r = tl.maximum(r, length_t_v - length_v)
    r = tl.where(r > _NONE // 2, r, 0)  # tangents, if there are any, are zeros
    r = tl.where(length_t > _NONE, tl.maximum(r, length_g - length_t), r)
    u_g = tl.maximum(length_g, length_t + r)
    u_g = tl.where(u_g > _NONE // 2, u_g, 0) - MOST_G
    u_t = u_g - r

    tl.store(factors + SIGMA, sigma)
    tl.store(factors + O, _power(u_v))
    tl.store(factors + O_T, _power(u_v + r))
    tl.store(factors + MU, _power(r))
    tl.store(factors + D_Q, _power(u_g + u_v - u_q - SHIFT))
    tl.store(factors + D_K, _power(u_g + u_v - u_k - SHIFT))
    tl.store(factors + D_V, _power(u_g - SHIFT))
    tl.store(factors + D_Q_T, _power(u_t + u_v - u_q - SHIFT))
    tl.store(factors + D_K_T, _power(u_t + u_v - u_k - SHIFT))
    tl.store(factors + D_V_T, _power(u_t - SHIFT))
    tl.store(factors + OWN_MU, _power(-r))
    tl.store(factors + OWN_O, _power(-u_v))
    tl.store(factors + OWN_O_T, _power(-u_v - r))
    tl.store(factors + OF_QUERIES, _power(-u_q))
    tl.store(factors + OF_QUERIES + 1, _power(-u_q - r))
    tl.store(factors + OF_QUERIES + 2, _power(-u_g))
    tl.store(factors + OF_QUERIES + 3, _power(-u_t))
    tl.store(factors + OF_KEYS, _power(-u_k))
    tl.store(factors + OF_KEYS + 1, _power(-u_v))
    tl.store(factors + OF_KEYS + 2, _power(-u_k - r))
    tl.store(factors + OF_KEYS + 3, _power(-u_v - r))


@triton.jit
def _rescale(x, half, factor, first, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REGULAR: tl.constexpr):
    if len(x) > 0:
        tile = load_rows(x, first, rows, ROWS, COLUMNS, REGULAR)
        tile = scale_rows(tile, tl.full([ROWS], tl.load(factor), tl.float32))
        store_rows(half, tile, first, rows, COLUMNS, REGULAR)


@triton.jit(do_not_specialize=["M", "N", "heads"])
def rescale_kernel(
    x0, x1, x2, x3, half0, half1, half2, half3, factors, scale, batch_shape, M, N, heads, group,
    K_COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, REGULAR: tl.constexpr,
):  # fmt: skip
    """One program: some rows of q, q_t, d_o and d_o_t, or of k, v, k_t and v_t, times their factors."""
    batch, head, first, rows = _place_of(M, N, heads, group, ROWS, KEYS)
    factor = factors + (OF_KEYS if KEYS else OF_QUERIES)
    a = select_head(x0, batch, head, batch_shape, REGULAR), select_head(half0, batch, head, batch_shape, REGULAR)
    b = select_head(x1, batch, head, batch_shape, REGULAR), select_head(half1, batch, head, batch_shape, REGULAR)
    c = select_head(x2, batch, head, batch_shape, REGULAR), select_head(half2, batch, head, batch_shape, REGULAR)
    d = select_head(x3, batch, head, batch_shape, REGULAR), select_head(half3, batch, head, batch_shape, REGULAR)
    _rescale(a[0], a[1], factor, first, rows, ROWS, K_COLUMNS, REGULAR)
    _rescale(b[0], b[1], factor + 1, first, rows, ROWS, K_COLUMNS, REGULAR)
    _rescale(c[0], c[1], factor + 2, first, rows, ROWS, K_COLUMNS, REGULAR)
    _rescale(d[0], d[1], factor + 3, first, rows, ROWS, K_COLUMNS, REGULAR)
