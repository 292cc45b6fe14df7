"""d_q and d_q_t of the queries that a program owns, without sums in global memory: bit-reproducible; MATH.md (1)-(6),
(9)-(15), (18). Tiles are [queries, keys].
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .ring import (
    HALF,
    LSE,
    MU,
    ROW_A,
    ROW_DELTA,
    STATISTICS,
    accumulator,
    barriers,
    keep_above,
    left_operand,
    of_queries,
    own_rows,
    produce,
    rows_of,
    streamed_rows,
    tiles_for,
    whole_tiles,
    write,
)


@gluon.jit
def _allowed(p, row0, tile, N, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr):
    """P where there is a key, a column of the tile, that the query may see; 0 elsewhere."""
    KEYS: gl.constexpr = p.shape[1]
    key = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))[None, :]
    p = gl.where(key < N, p, 0.0)
    if CAUSAL:
        query = row0 + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))[:, None]
        p = gl.where(key <= query, p, 0.0)
    return p


@gluon.jit
def _row_statistic(stats, head, padded, rows, which: gl.constexpr):
    """[64, 1] of the statistics [heads of all batches, 4, padded rows]."""
    return gl.load(stats + (head * STATISTICS + which) * padded + rows)[:, None]


@gluon.jit
def _plain_tile(
    acc, own, streamed, rows, passed, scale, row0, tile, N, D: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds a tile's part of d_q / c, without tangents."""
    q, G = own
    k, v = streamed
    lse, delta = rows[0], rows[3]
    KEYS: gl.constexpr = k.shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    WEIGHTS: gl.constexpr = left_operand(D)
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    b = warpgroup_mma(G, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if MASKED:
        p = _allowed(p, row0, tile, N, TILE, CAUSAL)
    keep_above(passed)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = gl.convert_layout((p * (b - delta)).to(k.dtype), WEIGHTS)
    return (warpgroup_mma(ds, k, acc[0]),)


@gluon.jit
def _tangent_tile(
    acc, own, streamed, rows, passed, scale, row0, tile, N, D: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds a tile's part of d_q / c and d_q_t / c."""
    acc_q, acc_q_t = acc
    q, G, q_t, T = own
    k, v, k_t, v_t = streamed
    lse, mu, row_a, delta = rows
    KEYS: gl.constexpr = k.shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    WEIGHTS: gl.constexpr = left_operand(D)
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    a = warpgroup_mma(T, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(q_t, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(q, k_t.permute((1, 0)), s_t, is_async=True)
    s = warpgroup_mma_wait(3, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if MASKED:
        p = _allowed(p, row0, tile, N, TILE, CAUSAL)
    keep_above(passed)
    a = warpgroup_mma_wait(2, deps=[a])
    centred = a - row_a
    ds_t = gl.convert_layout((p * centred).to(k.dtype), WEIGHTS)
    keep_above(passed)
    acc_q_t = warpgroup_mma(ds_t, k, acc_q_t, is_async=True)
    acc_q = warpgroup_mma(ds_t, k_t, acc_q, is_async=True)
    s_t = warpgroup_mma_wait(2, deps=[s_t])
    b = (s_t * scale - mu) * centred - delta
    b = warpgroup_mma(G, v.permute((1, 0)), b, is_async=True)
    b = warpgroup_mma(T, v_t.permute((1, 0)), b, is_async=True)
    b = warpgroup_mma_wait(0, deps=[b])
    ds = gl.convert_layout((p * b).to(k.dtype), WEIGHTS)
    acc_q = warpgroup_mma(ds, k, acc_q, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc_q, acc_q_t])


@gluon.jit
def _walk(
    acc, shared, scale, row0, N, first, last, who: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds the tiles from `first` to `last`; MASKED if some of their keys are."""
    held, own_tiles, ring, rows, full, empty = shared
    D: gl.constexpr = ring[0].shape[4]
    row = row0 + who * HALF
    for tile in range(first, last):
        stage = tile % STAGES
        passed = (full.index(stage), (tile // STAGES) & 1)
        mbarrier.wait(passed[0], passed[1])
        own = held + own_rows(own_tiles[len(held) :], who, tile)
        streamed = streamed_rows(ring, stage)
        if len(own_tiles) == 2:
            acc = _plain_tile(acc, own, streamed, rows, passed, scale, row, tile, N, D, CAUSAL, MASKED)
        else:
            acc = _tangent_tile(acc, own, streamed, rows, passed, scale, row, tile, N, D, CAUSAL, MASKED)
        mbarrier.arrive(empty.index(stage), count=1)
    return acc


@gluon.jit
def _consume(
    outs, own_tiles, ring, stats, bars, place, walk, scale, M, N, who: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 queries."""
    own_full, full, empty = bars
    batch, own_head, row0 = place
    last, heads = walk[3], walk[4]
    D: gl.constexpr = ring[0].shape[4]
    KEYS: gl.constexpr = ring[0].shape[3]
    ACC: gl.constexpr = accumulator(D)
    TILE: gl.constexpr = accumulator(KEYS)
    numbers = row0 + who * HALF + gl.arange(0, HALF, gl.SliceLayout(1, TILE))
    head = batch.to(gl.int64) * heads + own_head
    padded = gl.cdiv(M, 2 * HALF) * (2 * HALF)
    rows = (
        _row_statistic(stats, head, padded, numbers, LSE),
        _row_statistic(stats, head, padded, numbers, MU),
        _row_statistic(stats, head, padded, numbers, ROW_A),
        _row_statistic(stats, head, padded, numbers, ROW_DELTA),
    )
    acc = ()
    for _i in gl.static_range(len(outs)):
        acc = acc + (gl.zeros([HALF, D], gl.float32, ACC),)
    mbarrier.wait(own_full.index(0), 0)
    held = ()
    for i in gl.static_range(HELD):
        held = held + (rows_of(own_tiles[i].index(who)).load(left_operand(KEYS)),)
    whole = whole_tiles(row0 + who * HALF, N, last, KEYS, CAUSAL)
    shared = (held, own_tiles, ring, rows, full, empty)
    acc = _walk(acc, shared, scale, row0, N, 0, whole, who, STAGES, CAUSAL, False)
    acc = _walk(acc, shared, scale, row0, N, whole, last, who, STAGES, CAUSAL, True)
    for i in gl.static_range(len(outs)):
        write(outs[i], acc[i] * scale, own_tiles[i].index(who), place, who)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_query_kernel(
    q, G, q_t, T, k, v, k_t, v_t, stats, d_q, d_q_t, scale, M, N, heads, group,
    JVP: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head against all keys. `stats` cover whole programs, rows beyond the end, too."""
    own = (q, G)
    streamed = (k, v)
    outs = (d_q,)
    if JVP:
        own = own + (q_t, T)
        streamed = streamed + (k_t, v_t)
        outs = outs + (d_q_t,)
    KEYS: gl.constexpr = k.block_shape[2]
    gdc_launch_dependents()
    place, walk = of_queries(M, N, heads, group, KEYS, CAUSAL)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (outs, own_tiles, ring, stats, bars, place, walk, scale, M, N, 0, STAGES, CAUSAL, HELD)),
            (_consume, (outs, own_tiles, ring, stats, bars, place, walk, scale, M, N, 1, STAGES, CAUSAL, HELD)),
            (produce, (own, streamed, (), own_tiles, ring, (), bars, place, walk, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
