"""What the two consumers of backward_one_pass.py do with a tile of queries; MATH.md (1)-(6), (9)-(20).

Tiles are [keys, queries]. With one column chunk of 128 columns, queries come as pairs: q above q_t and T above G, each
in one tile (pairs.py).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .blocks import CONSUMER_ROWS, where_key_exists
from .chunks import add_product, add_scores, complete, left_operands, zero
from .dq_accum import atomic_add_tile, without_padding
from .one_pass_exchange import (
    DS,
    DS_T,
    P,
    Z,
    await_ds,
    await_free,
    await_given,
    ds_of_queries,
    give,
    give_ds,
    load_numbers,
    release,
    store_numbers,
)
from .packed_mask import where_allowed
from .pairs import split_product, split_rows
from .pipeline import LSE, MU, ROW_A, ROW_DELTA, accumulator, keep_above, row_statistic
from .triton_compat import addressed_here, made_here

QUERIES = gl.constexpr(0)  # which two of the streamed tensors: q and q_t
COTANGENTS = gl.constexpr(1)  # T and G


class Inputs(NamedTuple):
    """What a tile's function reads. Of each tensor the column chunks are a tuple."""

    resident: Any  # of the first consumer k, k_t, v, v_t; of the second v, v_t, k, k_t
    streamed: Any  # q, q_t, T, G; or the pairs q above q_t, T above G
    stats: Any  # [4, streamed rows]
    mask: Any  # of the first consumer (words of a packed mask,), or ()
    dq_tile: Any  # its number among those of all heads
    iteration: Any
    passed: Any  # (barrier, phase) of the tile, for `keep_above`
    empty: Any  # the barrier at which a consumer arrives when it is through with the streamed tiles


@gluon.jit
def _two_of(streamed, which: gl.constexpr):
    """q and q_t, or T and G."""
    if len(streamed) == 2:
        y, y_t = split_rows(streamed[which][0])
        return (y,), (y_t,)
    else:
        return streamed[2 * which], streamed[2 * which + 1]


@gluon.jit
def _products(x, x_t, streamed, which: gl.constexpr, ROWS: gl.constexpr):
    """(x @ y.T, complete; x_t @ y.T + x @ y_t.T, in flight) for (y, y_t) = (q, q_t) or (T, G).

    As a pair y and y_t read x once.
    """
    if len(streamed) == 2:
        PAIR: gl.constexpr = accumulator(2 * ROWS)
        pair = add_scores(gl.zeros([CONSUMER_ROWS, 2 * ROWS], gl.float32, PAIR), x, streamed[which], USE_ACC=False)
        s, s_t = split_product(warpgroup_mma_wait(0, deps=[pair]))
        s_t = s_t + 0.0
    else:
        nothing = gl.zeros([CONSUMER_ROWS, ROWS], gl.float32, accumulator(ROWS))
        y, y_t = _two_of(streamed, which)
        s = add_scores(nothing, x, y, USE_ACC=False)
        s_t = add_scores(nothing, x, y_t, USE_ACC=False)
        s = warpgroup_mma_wait(len(x), deps=[s])
    return s, add_scores(s_t, x_t, _two_of(streamed, which)[0], WHOLE=len(streamed) == 4)  # mutate: return s


@gluon.jit
def _add_ds_product(totals, which: gl.constexpr, keys, exchange, inputs, USE_ACC: gl.constexpr = True):
    """In flight: each chunk's total + dS.T @ keys, or dS_t.T @ keys."""
    found = ()
    for i in gl.static_range(len(keys)):
        ds = ds_of_queries(exchange, which, inputs.iteration)
        found = found + (warpgroup_mma(ds, addressed_here(keys[i]), totals[i], use_acc=USE_ACC, is_async=True),)
    return found


@gluon.jit
def _dq_product(k, k_t, exchange, inputs, TANGENT: gl.constexpr):
    """In flight: what the tile gives to d_q / c (15), or with TANGENT to d_q_t / c (18)."""
    totals = ()
    for i in gl.static_range(len(k)):
        totals = totals + (zero(k[i].shape[1]),)
    if TANGENT:
        totals = _add_ds_product(totals, DS_T, k, exchange, inputs, USE_ACC=False)
    else:
        totals = _add_ds_product(totals, DS, k, exchange, inputs, USE_ACC=False)
        totals = _add_ds_product(totals, DS_T, k_t, exchange, inputs)  # mutate: totals
    return totals


@gluon.jit
def _add_to(dq_accum, totals, tile, COLUMNS: gl.constexpr):
    """Adds the chunks to those of tile `tile` of all heads, of COLUMNS columns in all."""
    FIRST: gl.constexpr = totals[0].shape[1]
    first = tile.to(gl.int64) * (CONSUMER_ROWS * COLUMNS)  # mutate: first
    for i in gl.static_range(len(totals)):
        total = without_padding(totals[i], COLUMNS - FIRST) if i > 0 else totals[i]
        atomic_add_tile(dq_accum + (first + i * CONSUMER_ROWS * FIRST), total)


@gluon.jit
def tile_of_scores(accs, exchange, dq_accums, inputs, program, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_v, d_v_t and d_q_t / c."""
    acc_v, acc_v_t = accs
    k, k_t, _v, _v_t = inputs.resident
    CHUNKS: gl.constexpr = len(k)
    ROWS: gl.constexpr = inputs.stats.shape[1]
    TILE: gl.constexpr = accumulator(ROWS)
    WHOLE: gl.constexpr = len(inputs.streamed) == 4
    lse = row_statistic(inputs.stats, LSE, TILE)
    s, s_t = _products(k, k_t, inputs.streamed, QUERIES, ROWS)
    p = gl.exp2(s * (program.scale * 1.4426950408889634) - lse)
    if DQ_COLUMNS > 0:
        p = where_key_exists(p, program, 0, TILE)
    p = where_allowed(p, inputs.mask, 0.0, TILE)
    weights = left_operands(p.to(k[0].dtype), k)
    keep_above(inputs.passed)
    T, G = _two_of(inputs.streamed, COTANGENTS)
    acc_v_t = add_product(acc_v_t, weights, T, WHOLE)
    acc_v = add_product(acc_v, weights, G, WHOLE)
    await_free(exchange, inputs.iteration)
    store_numbers(exchange, P, p)
    mu = row_statistic(inputs.stats, MU, TILE)
    s_t = warpgroup_mma_wait(2 * CHUNKS, deps=[s_t])
    z = s_t * program.scale - mu  # mutate: z
    store_numbers(exchange, Z, z)
    give(exchange)
    T, _G = _two_of(inputs.streamed, COTANGENTS)
    acc_v = add_product(acc_v, left_operands((p * z).to(k[0].dtype), k), T, WHOLE)
    accs = complete(acc_v + acc_v_t)
    mbarrier.arrive(inputs.empty, count=1)
    if DQ_COLUMNS > 0:
        await_ds(exchange, inputs.iteration)
        totals = complete(_dq_product(k, k_t, exchange, inputs, True))
        _add_to(dq_accums[1], totals, inputs.dq_tile, DQ_COLUMNS)
    return accs


@gluon.jit
def tile_of_cotangents(accs, exchange, dq_accums, inputs, program, DQ_COLUMNS: gl.constexpr):
    """Adds what a tile gives to d_k / c, d_k_t / c and d_q / c."""
    acc_k, acc_k_t = accs
    v, v_t, k, k_t = inputs.resident
    ROWS: gl.constexpr = inputs.stats.shape[1]
    TILE: gl.constexpr = accumulator(ROWS)
    WHOLE: gl.constexpr = len(inputs.streamed) == 4
    if DQ_COLUMNS == 0:  # else there are no registers for it while A is awaited
        row_a = row_statistic(inputs.stats, ROW_A, TILE)
    a, b = _products(v, v_t, inputs.streamed, COTANGENTS, ROWS)
    if DQ_COLUMNS > 0:
        row_a = row_statistic(inputs.stats, ROW_A, TILE)
    centred = a - row_a
    delta = row_statistic(inputs.stats, ROW_DELTA, TILE)
    b = warpgroup_mma_wait(0, deps=[b])
    b = b - delta  # mutate: b
    await_given(exchange, inputs.iteration)
    b = made_here(load_numbers(exchange, Z) * centred + b)
    p = load_numbers(exchange, P)
    ds_t = made_here(p * centred).to(k[0].dtype)
    ds = made_here(p * b).to(k[0].dtype)
    if DQ_COLUMNS > 0:
        give_ds(exchange, ds, ds_t)
    else:
        keep_above(inputs.passed)
        release(exchange)
    weights_t = left_operands(ds_t, k)
    q, q_t = _two_of(inputs.streamed, QUERIES)
    acc_k_t = add_product(acc_k_t, weights_t, q, WHOLE)
    acc_k = add_product(acc_k, weights_t, q_t, WHOLE)  # mutate: acc_k
    acc_k = add_product(acc_k, left_operands(ds, k), q, WHOLE)
    accs = complete(acc_k + acc_k_t)
    mbarrier.arrive(inputs.empty, count=1)
    if DQ_COLUMNS > 0:
        await_ds(exchange, inputs.iteration)
        totals = complete(_dq_product(k, k_t, exchange, inputs, False))
        release(exchange)
        _add_to(dq_accums[0], totals, inputs.dq_tile, DQ_COLUMNS)
    return accs
