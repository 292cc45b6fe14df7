"""d_v and d_v_t of the keys that a program owns; MATH.md (1)-(6), (17), (20). Tiles are [keys, queries]."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backward_key import only_seen
from .ring import (
    HALF,
    LSE,
    MU,
    accumulator,
    barriers,
    keep_above,
    left_operand,
    of_keys,
    own_rows,
    produce,
    statistic,
    streamed_rows,
    tiles_for,
    write,
)


@gluon.jit
def _tile(
    acc_v,
    acc_v_t,
    own,
    streamed,
    stats,
    passed,
    scale,
    row0,
    tile,
    who: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Adds a tile's part of d_v and d_v_t."""
    k, k_t = own
    q, G, q_t, T = streamed
    ROWS: gl.constexpr = q.shape[0]
    TILE: gl.constexpr = accumulator(ROWS)
    WEIGHTS: gl.constexpr = left_operand(D)
    zero = gl.zeros([HALF, ROWS], gl.float32, TILE)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(k_t, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(k, q_t.permute((1, 0)), s_t, is_async=True)
    lse = statistic(stats, LSE, TILE)
    s = warpgroup_mma_wait(2, deps=[s])
    p = gl.exp2(s * (scale * 1.4426950408889634) - lse)
    if CAUSAL:
        p = only_seen(p, row0, tile, who, TILE)
    weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
    keep_above(passed)
    acc_v_t = warpgroup_mma(weights, T, acc_v_t, is_async=True)
    acc_v = warpgroup_mma(weights, G, acc_v, is_async=True)
    mu = statistic(stats, MU, TILE)
    s_t = warpgroup_mma_wait(2, deps=[s_t])
    weights_t = gl.convert_layout((p * (s_t * scale - mu)).to(q.dtype), WEIGHTS)
    acc_v = warpgroup_mma(weights_t, T, acc_v, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc_v, acc_v_t])


@gluon.jit
def _consume(
    outs, own_tiles, ring, stats_ring, bars, place, walk, scale, who: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """A consumer: the gradients of 64 keys."""
    own_full, full, empty = bars
    row0 = place[2]
    heads_shared, first, last = walk[1], walk[2], walk[3]
    D: gl.constexpr = ring[0].shape[4]
    ACC: gl.constexpr = accumulator(D)
    acc_v = gl.zeros([HALF, D], gl.float32, ACC)
    acc_v_t = gl.zeros([HALF, D], gl.float32, ACC)
    mbarrier.wait(own_full.index(0), 0)
    at = 0
    for _member in range(heads_shared):
        for tile in range(first, last):
            stage = at % STAGES
            passed = (full.index(stage), (at // STAGES) & 1)
            mbarrier.wait(passed[0], passed[1])
            own = own_rows(own_tiles, who, at)
            streamed = streamed_rows(ring, stage)
            acc_v, acc_v_t = _tile(
                acc_v, acc_v_t, own, streamed, stats_ring[0].index(stage), passed, scale, row0, tile, who, D, CAUSAL
            )
            mbarrier.arrive(empty.index(stage), count=1)
            at += 1
    write(outs[0], acc_v, own_tiles[0].index(who), place, who)
    write(outs[1], acc_v_t, own_tiles[1].index(who), place, who)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def backward_value_kernel(
    k, k_t, q, G, q_t, T, stats, d_v, d_v_t, scale, M, N, heads, group, CAUSAL: gl.constexpr, STAGES: gl.constexpr
):
    """One program: 128 keys of one key head against all queries of its heads."""
    own = (k, k_t)
    streamed = (q, G, q_t, T)
    ROWS: gl.constexpr = q.block_shape[2]
    gdc_launch_dependents()
    place, walk = of_keys(M, N, heads, group, ROWS, CAUSAL)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    stats_ring = tiles_for((stats,), STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    outs = (d_v, d_v_t)
    gl.warp_specialize(
        [
            (_consume, (outs, own_tiles, ring, stats_ring, bars, place, walk, scale, 0, STAGES, CAUSAL)),
            (_consume, (outs, own_tiles, ring, stats_ring, bars, place, walk, scale, 1, STAGES, CAUSAL)),
            (produce, (own, streamed, (stats,), own_tiles, ring, stats_ring, bars, place, walk, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    gdc_wait()  # so that the end of this kernel is the end of those before it, too
