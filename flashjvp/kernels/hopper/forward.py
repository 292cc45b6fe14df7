"""o, and under a JVP o_t, of the queries that a program owns, streaming over key tiles; MATH.md (1)-(7'').

The weights of v in o_t are centred on the running mean c of S_t, the tile's own scores included: centred on that of the
tiles before, a key that outweighs all of them would be rounded with its distance from a mean that counts no more.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from .chunks import add_product, add_scores, by_tensor, chunks, complete, follow, left_operands, plus, times, zeros
from .packed_mask import load_words, where_allowed, words_by_keys
from .pipeline import (
    HALF,
    accumulator,
    barriers,
    given,
    held_rows,
    keep_above,
    of_queries,
    own_rows,
    produce,
    scale_of,
    streamed_rows,
    tiles_for,
    where_seen,
    whole_tiles,
    write,
)
from .scales import MU, O
from .triton_compat import sum_of_products

# In base 2, how far scores may be above the "maximum" that P is taken from before that follows: P stays below 256 then,
# and what was summed before is seldom rescaled.
LAG = gl.constexpr(8.0)


@gluon.constexpr_function
def _exact(dtype):
    """Whether the maximum is subtracted from the scores before they are scaled: P of the largest one is then 1 also in
    a type with more digits than bfloat16. Otherwise it is so up to the rounding of the scaled maximum, the same for all
    keys of a row, and takes one instruction a score less."""
    return dtype != gl.bfloat16


@gluon.jit
def _softmax(
    s, m, l, scale, row0, tile, N, words, dtype: gl.constexpr, LAYOUT: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """P of a tile up to the row's sum, the tile's and the running sum, the running maximum of the scores, and the
    factor of what was summed before. The scale is positive. The maximum is of scores in base 2, and follows them with
    a LAG, or, where it is `_exact`, of those before they are scaled.
    """
    scale2 = scale * 1.4426950408889634
    EXACT: gl.constexpr = _exact(dtype)
    if MASKED:
        s = where_seen(s, float("-inf"), row0, tile, N, LAYOUT, CAUSAL)
    s = where_allowed(s, words, float("-inf"), LAYOUT)
    top = gl.max(s, 1)
    m_new = gl.maximum(m, top) if EXACT else gl.where(top * scale2 > m + LAG, top * scale2, m)
    finite = m_new
    if len(words) > 0:  # no key so far may be allowed
        finite = gl.where(m_new > float("-inf"), m_new, 0.0)
    if EXACT:
        alpha = gl.exp2((m - finite) * scale2)
        p = gl.exp2((s - finite[:, None]) * scale2)
    else:
        alpha = gl.exp2(m - finite)
        p = gl.exp2(s * scale2 - finite[:, None])
    mass = gl.sum(p, 1)
    return p, mass, l * alpha + mass, m_new, alpha


@gluon.jit
def _divisor(l, mask):
    """A running sum to divide by: 0 is 1 where a mask may hide all keys."""
    if len(mask) > 0:
        l = gl.where(l > 0.0, l, 1.0)
    return l


@gluon.jit
def _plain_tile(
    accs, state, own, streamed, words, passed, scale, row0, tile, N, CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """Adds a tile to o; without tangents."""
    m, l = state
    k, v = streamed
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    WIDE: gl.constexpr = v[0].shape[1] > HALF  # else a branch takes longer than the products that it skips
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = warpgroup_mma_wait(0, deps=[add_scores(zero, own[0], k, USE_ACC=False)])
    p, _mass, l, m, alpha = _softmax(s, m, l, scale, row0, tile, N, words, v[0].dtype, TILE, CAUSAL, MASKED)
    acc_o = follow(accs[0], alpha) if WIDE else times(accs[0], alpha)
    acc_o = add_product(acc_o, left_operands(p.to(v[0].dtype), v), v)
    return complete(acc_o), (m, l)


@gluon.jit
def _tangent_tile(
    accs, state, own, streamed, words, passed, scale, row0, tile, N, CAUSAL: gl.constexpr, MASKED: gl.constexpr
):
    """Adds a tile to o and o_t."""
    acc_o, acc_o_t = accs
    m, l, c = state
    q, q_t = own
    k, v, k_t, v_t = streamed
    CHUNKS: gl.constexpr = len(k)
    KEYS: gl.constexpr = k[0].shape[0]
    TILE: gl.constexpr = accumulator(KEYS)
    # P is multiplied with v_t while S_t is awaited: faster where a product is several, if there are registers for it.
    EARLY: gl.constexpr = KEYS <= HALF and CHUNKS > 1
    zero = gl.zeros([HALF, KEYS], gl.float32, TILE)
    s = add_scores(zero, q, k, USE_ACC=False)
    s_t = add_scores(zero, q_t, k, USE_ACC=False)
    s_t = add_scores(s_t, q, k_t)
    s = warpgroup_mma_wait(2 * CHUNKS, deps=[s])
    p, mass, l, m, alpha = _softmax(s, m, l, scale, row0, tile, N, words, v[0].dtype, TILE, CAUSAL, MASKED)
    acc_o_t = follow(acc_o_t, alpha, HERE=not EARLY)
    acc_o = follow(acc_o, alpha, HERE=not EARLY)
    weights = left_operands(p.to(v[0].dtype), v)
    keep_above(passed)
    if EARLY:
        acc_o_t = add_product(acc_o_t, weights, v_t)
    s_t = warpgroup_mma_wait(CHUNKS if EARLY else 0, deps=[s_t])
    back = (c * mass - sum_of_products(p, s_t, 8, TILE) * scale) / _divisor(l, words)
    c -= back
    weights_t = left_operands((p * (s_t * scale - c[:, None])).to(v[0].dtype), v)
    if EARLY:
        keep_above(passed)
        acc_o_t = plus(complete(acc_o_t), times(acc_o, back))
    else:
        acc_o_t = add_product(plus(acc_o_t, times(acc_o, back)), weights, v_t)
    acc_o_t = add_product(acc_o_t, weights_t, v)
    acc_o = add_product(acc_o, weights, v)
    return complete(acc_o + acc_o_t), (m, l, c)


@gluon.jit
def _walk(
    accs, state, tiles, scale, row0, N, first, last, who: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Adds the tiles from `first` to `last`. Where no tile has a masked key, a loop without masks: a condition in the
    loop would become a selection for each score. Words of a mask are loaded a tile ahead without tangents; beside them
    registers are short."""
    held, own_tiles, ring, full, empty, bits = tiles
    KEYS: gl.constexpr = ring[0].shape[3]
    row = row0 + who * HALF
    AHEAD: gl.constexpr = len(state) == 2
    coming = load_words(bits, row, gl.minimum(first, last - 1), KEYS) if AHEAD else ()
    for tile in range(first, last):
        stage = tile % STAGES
        passed = (full.index(stage), (tile // STAGES) & 1)
        if AHEAD:
            words = coming
            coming = load_words(bits, row, gl.minimum(tile + 1, last - 1), KEYS)
        else:
            words = load_words(bits, row, tile, KEYS)
        mbarrier.wait(passed[0], passed[1])
        own = by_tensor(held + own_rows(own_tiles[len(held) :], who, tile), CHUNKS)
        streamed = by_tensor(streamed_rows(ring, stage), CHUNKS)
        sums = by_tensor(accs, CHUNKS)
        if len(own) == 1:
            accs, state = _plain_tile(sums, state, own, streamed, words, passed, scale, row, tile, N, CAUSAL, MASKED)
        else:
            accs, state = _tangent_tile(sums, state, own, streamed, words, passed, scale, row, tile, N, CAUSAL, MASKED)
        mbarrier.arrive(empty.index(stage), count=1)
    return accs, state


@gluon.jit
def _consume(
    shared, scale, M, N, who: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HELD: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries."""
    outs, statistics, own_tiles, ring, bits, factors, bars, place, walk = shared
    own_full, full, empty = bars
    batch, own_head, row0 = place
    last, heads = walk[3], walk[4]
    JVP: gl.constexpr = len(statistics) == 2
    KEYS: gl.constexpr = ring[0].shape[3]
    ROW: gl.constexpr = gl.SliceLayout(1, accumulator(KEYS))
    accs = zeros(own_tiles[: len(outs)])
    state = (gl.full([HALF], float("-inf"), gl.float32, ROW), gl.zeros([HALF], gl.float32, ROW))
    if JVP:
        state = state + (gl.zeros([HALF], gl.float32, ROW),)
    mbarrier.wait(own_full.index(0), 0)
    held = held_rows(own_tiles[: HELD * CHUNKS], who, KEYS)
    whole = whole_tiles(row0 + who * HALF, N, last, KEYS, CAUSAL)
    tiles = (held, own_tiles, ring, full, empty, bits)
    accs, state = _walk(accs, state, tiles, scale, row0, N, 0, whole, who, CHUNKS, STAGES, CAUSAL, False)
    accs, state = _walk(accs, state, tiles, scale, row0, N, whole, last, who, CHUNKS, STAGES, CAUSAL, True)
    rows = row0 + who * HALF + gl.arange(0, HALF, ROW)
    offset = (batch.to(gl.int64) * heads + own_head) * M + rows
    norm = 1.0 / _divisor(state[1], bits)  # a row without keys has zeros, and -inf for lse
    lse = (state[0] if not _exact(own_tiles[0].dtype) else state[0] * (scale * 1.4426950408889634)) - gl.log2(norm)
    gl.store(statistics[0] + offset, lse * 0.6931471805599453, mask=rows < M)
    if JVP:
        mu = state[2]
        if len(factors) > 0:
            mu = mu * gl.load(factors[0] + MU)
        gl.store(statistics[1] + offset, mu, mask=rows < M)
    write(outs, times(accs, norm), own_tiles, place, factors, who, CHUNKS, O, 1)


@gluon.jit(do_not_specialize=["M", "N", "heads"])
def forward_kernel(
    q, q_rest, q_t, q_t_rest, k, k_rest, v, v_rest, k_t, k_t_rest, v_t, v_t_rest, o, o_rest, o_t, o_t_rest, lse, mu,
    mask, factors, scale, M, N, heads, group,
    JVP: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr, VARIES: gl.constexpr,
):  # fmt: skip
    """One program: 128 queries of one head against all keys. A `_rest` is a tensor's second chunk, if it has one."""
    own = chunks(q, q_rest)
    streamed = chunks(k, k_rest) + chunks(v, v_rest)
    outs = chunks(o, o_rest)
    statistics = (lse,)
    CHUNKS: gl.constexpr = len(own)
    if JVP:
        own = own + chunks(q_t, q_t_rest)
        streamed = streamed + chunks(k_t, k_t_rest) + chunks(v_t, v_t_rest)
        outs = outs + chunks(o_t, o_t_rest)
        statistics = statistics + (mu,)
    KEYS: gl.constexpr = k.block_shape[2]
    scale = scale_of(factors, scale)
    place, walk = of_queries(M, N, heads, group, KEYS, CAUSAL)
    bits = words_by_keys(mask, place[0], place[1], heads, M, N, VARIES)
    own_tiles = tiles_for(own, 2)
    ring = tiles_for(streamed, STAGES)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    shared = (outs, statistics, own_tiles, ring, bits, given(factors), bars, place, walk)
    gl.warp_specialize(
        [
            (produce, (own, streamed, (), own_tiles, ring, (), bars, place, walk, CHUNKS, STAGES)),
            (_consume, (shared, scale, M, N, 0, CHUNKS, STAGES, CAUSAL, HELD)),
            (_consume, (shared, scale, M, N, 1, CHUNKS, STAGES, CAUSAL, HELD)),
        ],
        [4, 4],
        [240, 240],
    )
