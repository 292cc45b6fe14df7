"""o, and under a JVP o_t, of the queries that a program owns, streaming over key tiles; MATH.md (1)-(7'').

The weights of v in o_t are centred on the running mean c of S_t, the tile's own scores included: centred on that of the
tiles before, a key that outweighs all of them would be rounded with its distance from a mean that counts no more.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .ring import (
    HALF,
    accumulator,
    barriers,
    keep_above,
    left_operand,
    of_queries,
    own_rows,
    produce,
    streamed_rows,
    tiles_for,
    whole_tiles,
    write,
)


@gluon.jit
def _allowed(s, row0, tile, N, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr):
    """The scores with -inf where there is no key, a column of the tile, or the query may not see it."""
    KEYS: gl.constexpr = s.shape[1]
    key = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))[None, :]
    s = gl.where(key < N, s, float("-inf"))
    if CAUSAL:
        query = row0 + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))[:, None]
        s = gl.where(key <= query, s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, m, l, scale, row0, tile, N, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr):
    """P of a tile up to the row's sum, the tile's and the running sum, the running maximum, and the factor of what was
    summed before; base 2. The scale is positive."""
    scale2 = scale * 1.4426950408889634
    if MASKED:
        s = _allowed(s, row0, tile, N, LAYOUT, CAUSAL)
    m_new = gl.maximum(m, gl.max(s, 1))
    alpha = gl.exp2((m - m_new) * scale2)
    p = gl.exp2((s - m_new[:, None]) * scale2)
    mass = gl.sum(p, 1)
    return p, mass, l * alpha + mass, m_new, alpha


@gluon.jit
def _plain_tile(
    accs, state, own, streamed, passed, scale, row0, tile, N, D: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds a tile to o; without tangents."""
    m, l = state
    k, v = streamed
    KEYS: gl.constexpr = k.shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    ACC: gl.constexpr = accumulator(D)
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = warpgroup_mma(own[0], k.permute((1, 0)), zero, use_acc=False)
    p, _mass, l, m, alpha = _softmax(s, m, l, scale, row0, tile, N, TILE, CAUSAL, MASKED)
    acc_o = accs[0] * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]
    acc_o = warpgroup_mma(gl.convert_layout(p.to(k.dtype), left_operand(D)), v, acc_o)
    return (acc_o,), (m, l)


@gluon.jit
def _tangent_tile(
    accs, state, own, streamed, passed, scale, row0, tile, N, D: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds a tile to o and o_t."""
    acc_o, acc_o_t = accs
    m, l, c = state
    q, q_t = own
    k, v, k_t, v_t = streamed
    KEYS: gl.constexpr = k.shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    ACC: gl.constexpr = accumulator(D)
    WEIGHTS: gl.constexpr = left_operand(D)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    # P is multiplied with v_t while S_t is awaited, if the registers suffice for that.
    EARLY: gl.constexpr = KEYS <= HALF
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(q_t, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_t = warpgroup_mma(q, k_t.permute((1, 0)), s_t, is_async=True)
    s = warpgroup_mma_wait(2, deps=[s])
    p, mass, l, m, alpha = _softmax(s, m, l, scale, row0, tile, N, TILE, CAUSAL, MASKED)
    factor = gl.convert_layout(alpha, ROW)[:, None]
    acc_o_t = acc_o_t * factor
    acc_o = acc_o * factor
    weights = gl.convert_layout(p.to(k.dtype), WEIGHTS)
    keep_above(passed)
    if EARLY:
        acc_o_t = warpgroup_mma(weights, v_t, acc_o_t, is_async=True)
    s_t = warpgroup_mma_wait(1 if EARLY else 0, deps=[s_t])
    step = (gl.sum(p * s_t, 1) * scale - c * mass) / l
    c += step
    weights_t = gl.convert_layout((p * (s_t * scale - c[:, None])).to(k.dtype), WEIGHTS)
    moved = acc_o * gl.convert_layout(step, ROW)[:, None]
    if EARLY:
        keep_above(passed)
        acc_o_t = warpgroup_mma_wait(0, deps=[acc_o_t]) - moved
    else:
        acc_o_t = warpgroup_mma(weights, v_t, acc_o_t - moved, is_async=True)
    acc_o_t = warpgroup_mma(weights_t, v, acc_o_t, is_async=True)
    acc_o = warpgroup_mma(weights, v, acc_o, is_async=True)
    acc_o, acc_o_t = warpgroup_mma_wait(0, deps=[acc_o, acc_o_t])
    return (acc_o, acc_o_t), (m, l, c)


@gluon.jit
def _walk(
    accs, state, shared, scale, row0, N, first, last, who: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Adds the tiles from `first` to `last`. Where no tile has a masked key, a loop without masks: a condition in the
    loop would become a selection for each score."""
    own_tiles, ring, full, empty = shared
    D: gl.constexpr = ring[0].shape[4]
    row = row0 + who * HALF
    for tile in range(first, last):
        stage = tile % STAGES
        passed = (full.index(stage), (tile // STAGES) & 1)
        mbarrier.wait(passed[0], passed[1])
        own = own_rows(own_tiles, who, tile)
        streamed = streamed_rows(ring, stage)
        if len(own_tiles) == 1:
            accs, state = _plain_tile(accs, state, own, streamed, passed, scale, row, tile, N, D, CAUSAL, MASKED)
        else:
            accs, state = _tangent_tile(accs, state, own, streamed, passed, scale, row, tile, N, D, CAUSAL, MASKED)
        mbarrier.arrive(empty.index(stage), count=1)
    return accs, state


@gluon.jit
def _consume(
    outs, statistics, own_tiles, ring, bars, place, walk, scale, M, N, who: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries."""
    own_full, full, empty = bars
    batch, own_head, row0 = place
    last, heads = walk[3], walk[4]
    D: gl.constexpr = ring[0].shape[4]
    KEYS: gl.constexpr = ring[0].shape[3]
    TILE: gl.constexpr = accumulator(KEYS)
    ACC: gl.constexpr = accumulator(D)
    ROW: gl.constexpr = gl.SliceLayout(1, TILE)
    accs = ()
    state = (gl.full([HALF], float("-inf"), gl.float32, ROW), gl.zeros([HALF], gl.float32, ROW))
    for _i in gl.static_range(len(own_tiles)):
        accs = accs + (gl.zeros([HALF, D], gl.float32, ACC),)
    if len(own_tiles) == 2:
        state = state + (gl.zeros([HALF], gl.float32, ROW),)
    mbarrier.wait(own_full.index(0), 0)
    whole = whole_tiles(row0 + who * HALF, N, last, KEYS, CAUSAL)
    shared = (own_tiles, ring, full, empty)
    accs, state = _walk(accs, state, shared, scale, row0, N, 0, whole, who, STAGES, CAUSAL, False)
    accs, state = _walk(accs, state, shared, scale, row0, N, whole, last, who, STAGES, CAUSAL, True)
    rows = row0 + who * HALF + gl.arange(0, HALF, ROW)
    offset = (batch.to(gl.int64) * heads + own_head) * M + rows
    norm = 1.0 / state[1]
    factor = gl.convert_layout(norm, gl.SliceLayout(1, ACC))[:, None]
    gl.store(statistics[0] + offset, state[0] * scale - gl.log2(norm) * 0.6931471805599453, mask=rows < M)
    write(outs[0], accs[0] * factor, own_tiles[0].index(who), place, who)
    if len(own_tiles) == 2:
        gl.store(statistics[1] + offset, state[2], mask=rows < M)
        write(outs[1], accs[1] * factor, own_tiles[1].index(who), place, who)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def forward_kernel(
    q, q_t, k, v, k_t, v_t, o, o_t, lse, mu, scale, M, N, heads, group,
    JVP: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head against all keys."""
    own = (q,)
    streamed = (k, v)
    outs = (o,)
    statistics = (lse,)
    if JVP:
        own = own + (q_t,)
        streamed = streamed + (k_t, v_t)
        outs = outs + (o_t,)
        statistics = statistics + (mu,)
    KEYS: gl.constexpr = k.block_shape[2]
    place, walk = of_queries(M, N, heads, group, KEYS, CAUSAL)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (outs, statistics, own_tiles, ring, bars, place, walk, scale, M, N, 0, STAGES, CAUSAL)),
            (_consume, (outs, statistics, own_tiles, ring, bars, place, walk, scale, M, N, 1, STAGES, CAUSAL)),
            (produce, (own, streamed, (), own_tiles, ring, (), bars, place, walk, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
