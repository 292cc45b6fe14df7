"""The planted bugs of the warp-specialised kernels, but for wide head dims, scaling and additive masks."""

from .fault import Fault

HOPPER = "kernels/hopper/"
FORWARD, QUERY, KEY = HOPPER + "forward.py", HOPPER + "backward_query.py", HOPPER + "backward_key.py"
VALUE, PAIRS, DQ_ACCUM = HOPPER + "backward_value.py", HOPPER + "backward_pairs.py", HOPPER + "dq_accum.py"
PREPROCESS, POSTPROCESS = HOPPER + "backward_preprocess.py", HOPPER + "backward_postprocess.py"
PIPELINE, BLOCKS, RESULTS = HOPPER + "pipeline.py", HOPPER + "blocks.py", HOPPER + "results.py"
CHUNKS, LAUNCH, MASK = HOPPER + "chunks.py", HOPPER + "launch.py", HOPPER + "packed_mask.py"
MAINLOOP, OF_PAIRS = HOPPER + "mainloop.py", HOPPER + "pairs.py"
QUERY_PAIRS, KEY_PAIRS = HOPPER + "backward_query_pairs.py", HOPPER + "backward_key_pairs.py"
OPERANDS = HOPPER + "operands.py"


def _pipeline(
    name: str, file: str, marker: str, statement: str, case: str = "hopper_64", check: str = "emulated"
) -> Fault:
    return Fault(f"pipelines: {name}", "pipelines", file, marker, statement, case, check)


def _of_pairs(name: str, marker: str, statement: str) -> Fault:
    return _pipeline(f"{name} beside pairs of queries", KEY_PAIRS, marker, statement, check="emulated-pairs")


OF_PIPELINES = [
    # Forward and JVP
    _pipeline(
        "lse in the wrong base", FORWARD, "gl.store",
        "gl.store(statistics[0] + offset, lse, mask=rows < program.M)",
    ),
    _pipeline("alpha dropped from l", FORWARD, "return p tile_sum", "return p, tile_sum, l + tile_sum, m_new, alpha"),
    _pipeline(
        "a warp asks whether half of its rows moved", CHUNKS, "asked",
        'asked = f"setp.neu.f32 p, ${2 * count}, 0f3F800000; setp.neu.or.f32 p, ${2 * count}, 0f3F800000, p;"',
        "hopper_64_long",
    ),
    _pipeline(
        "lazy rescale where no row moved", CHUNKS, "return f reg",
        'return f"{{.reg .pred p; {asked} vote.sync.any.pred p, p, -1; @p bra.uni SAME; {products} SAME:}}"',
    ),
    _pipeline(
        "the maximum follows lazily but what was summed at once", FORWARD, "alpha",
        "alpha = gl.exp2(m - gl.maximum(m, tile_max * scale2))", "hopper_64", "emulated-bfloat16",
    ),
    _pipeline(
        "mu not subtracted", FORWARD, "weights_t",
        "weights_t = left_operands((p * (s_t * scale)).to(v[0].dtype), v)",
    ),
    _pipeline("o_t centred on a stale mean", FORWARD, "acc_o_t (1)", "acc_o_t = complete(acc_o_t)", "hopper_72"),
    _pipeline(
        "scale missing from the mean", FORWARD, "negative_step",
        "negative_step = (mean * tile_sum - sum_of_products(p, s_t, 8, TILE)) / divisor(l, inputs)",
    ),
    _pipeline(
        "tangent of v ignored", FORWARD, "acc_o_t (2)",
        "acc_o_t = add(acc_o_t, scale_rows(acc_o, negative_step))",
    ),
    _pipeline("S_t without q k_t", FORWARD, "s_t (1)", "s_t = add_scores(s_t, q_t, k_t)", "hopper_128"),
    _pipeline(
        "a wait for products one too short", FORWARD, "s_t (2)",
        "warpgroup_mma_wait(CHUNKS, deps=[s_t])\n"
        "s_t = zero if s_t.result is None else s_t.result",
        "hopper_64",
    ),
    _pipeline(
        "a missing tangent is not zero", HOPPER + "absent.py", "return like new_zeros",
        "return like.new_ones(1, 1, 1, 8)", "hopper_q_t_alone",
    ),
    # Query-side backward
    _pipeline("mu dropped", QUERY, "b", "b = (s_t * program.scale) * centred - delta"),
    _pipeline("delta dropped", QUERY, "b", "b = (s_t * program.scale - mu) * centred", "hopper_72"),
    _pipeline("G and T swapped", QUERY, "q, G, q_t, T", "q, T, q_t, G = inputs.resident"),
    _pipeline(
        "scale missing from d_q", QUERY, "store_results",
        "store_results(program, accs, consumer, CHUNKS, D_Q, 1)",
        "hopper_64_plain",
    ),
    _pipeline(
        "delta dropped beside pairs", QUERY_PAIRS, "b",
        "b = warpgroup_mma(addressed_here(G), v.permute((1, 0)), b + 0.0, is_async=True)", "hopper_128",
    ),
    _pipeline(
        "d_q with dS_t k for dS_t k_t", QUERY_PAIRS, "acc_q",
        "acc_q = warpgroup_mma(ds_t, k, acc_q, is_async=True)", "hopper_128",
    ),
    _pipeline("mu dropped beside pairs", QUERY_PAIRS, "s_t", "s_t = s_t * program.scale", "hopper_128"),
    _pipeline("v_t above v in a pair", OPERANDS, "streamed", "streamed = (k, k_t, v_t, v)", "hopper_128"),
    # Key-side backward
    _pipeline("row_a dropped", KEY, "centred", "centred = a"),
    _pipeline("delta dropped without tangents", KEY, "ds", "ds = (p * b).to(q[0].dtype)", "hopper_128_plain"),
    _pipeline("d_k from q for q_t", KEY, "acc_k", "acc_k = add_product(acc_k, weights_t, q)"),
    _pipeline("gradient without T v_t.T", KEY, "b", "pass", "hopper_72"),
    _pipeline(
        "G above T in a pair", OPERANDS, "streamed (2)", "streamed = (q, q_t, G, T)", check="emulated-pairs"
    ),
    _of_pairs("S_t without k_t q", "s_t", "s_t = add_scores(s_t + 0.0, k, (q,), WHOLE=False)"),
    _of_pairs("mu dropped", "s_t (2)", "s_t = s_t * program.scale"),
    _of_pairs("delta dropped", "b", "b = add_scores(b + 0.0, v_t, (T,), WHOLE=False)"),
    _of_pairs("d_v from T for G", "acc_v", "acc_v = add_product(acc_v, weights, (T,), WHOLE=False)"),
    _of_pairs("d_v from P for its tangent", "acc_v (2)", "acc_v = add_product(acc_v, weights, (T,), WHOLE=False)"),
    _of_pairs("d_k from q for q_t", "acc_k", "acc_k = add_product(acc_k, weights_t, (q,), WHOLE=False)"),
    _pipeline(
        "scale missing from d_k", KEY, "grads",
        "grads = grads + (accs[i] if WITH_DV and i // CHUNKS % 2 == 1 else accs[i],)",
    ),
    _pipeline(
        "causal off by one in the backward", BLOCKS, "p (1)",
        "p = gl.where(key < query, p, 0.0)", "hopper_64_causal",
    ),
    _pipeline(
        "scale missing from S_t of d_v", VALUE, "weights_t",
        "weights_t = left_operands((p * (s_t - mu)).to(q[0].dtype), q)", "hopper_72",
    ),
    _pipeline("G and T swapped in d_v", VALUE, "q, G, q_t, T", "q, T, q_t, G = inputs.streamed", "hopper_mask_128"),
    # Key and query gradients in one kernel
    _pipeline(
        "the tiles of a pair exchanged", OF_PAIRS, "x, y",
        "y, x = gl.split(product.reshape([CONSUMER_ROWS, 2, ROWS]).permute((0, 2, 1)))", "hopper_mask_128",
    ),
    _pipeline(
        "q_t and q exchanged in a pair", OF_PAIRS, "return pair slice",
        "return pair.slice(ROWS, ROWS, 0), pair.slice(0, ROWS, 0)", "hopper_mask_128",
    ),
    _pipeline(
        "d_q without dS_t k_t", PAIRS, "atomic_add_tile",
        "atomic_add_tile(dq.accums[0] + offset, total)", "hopper_mask_128", "emulated-dq-accum",
    ),
    _pipeline(
        "dq_accum of the first tile of queries for all", MAINLOOP, "before",
        "before = (block.batch * loop.query_heads + loop.head + member) * loop.end + loop.first",
        "hopper_mask_128", "emulated-dq-accum",
    ),
    _pipeline(
        "dS of one consumer for both", PAIRS, "ds",
        "ds = dq.ds_tiles.index(number % BUFFER_STAGES * 2 + consumer + (number >> 30) + here())",
        "hopper_mask_128", "emulated-dq-accum",
    ),
    _pipeline(
        "d_q with dS k_t", DQ_ACCUM, "total",
        "total = _add_ds_product(total, dq, k_t[OTHER], number, 0)", "hopper_72", "emulated-dq-accum",
    ),
    _pipeline(
        "d_q_t from dS", DQ_ACCUM, "total_t",
        "total_t = _add_ds_product(zero(k[consumer].shape[4]), dq, k[consumer], number, 0, USE_ACC=False)",
        "hopper_96", "emulated-dq-accum",
    ),
    _pipeline(
        "chunks of d_q over one another", DQ_ACCUM, "atomic_add_tile",
        "atomic_add_tile(dq.accums[0] + (tile), total)", "hopper_72", "emulated-dq-accum",
    ),
    _pipeline(
        "padding counted in the dq_accum of a tile", DQ_ACCUM, "tile",
        "tile = dq_tile.to(gl.int64) * (CONSUMER_ROWS * FIRST)", "hopper_72", "emulated-dq-accum",
    ),
    _pipeline(
        "dS_t of a tile's second sub-tile over that of its first", DQ_ACCUM, "store",
        "stored.slice((1 - i) * SUB_TILE * COLUMNS, COLUMNS, 1).store(tiles[i])",
        "hopper_96", "emulated-dq-accum",
    ),
    _pipeline(
        "dS overwritten before it is summed", DQ_ACCUM, "mbarrier.wait (1)",
        "pass", "hopper_96_many_tiles", "emulated-dq-accum",
    ),
    _pipeline(
        "dS read before the other consumer has stored it", DQ_ACCUM, "mbarrier.wait (2)",
        "pass", "hopper_96", "emulated-dq-accum",
    ),
    _pipeline(
        "dq_accum of the first head for all of a group", MAINLOOP, "before",
        "before = (block.batch * loop.query_heads + loop.head) * loop.end + tile", "hopper_72_gqa", "emulated-dq-accum",
    ),
    _pipeline(
        "second sub-tile read as the first", PIPELINE, "rows",
        "rows = rows + (tiles[i].slice(0 * (tiles[i].shape[0] // SUB_TILES), tiles[i].shape[0] // SUB_TILES, 0),)",
        "hopper_96", "emulated-dq-accum",
    ),
    # Preprocess and postprocess of the backward
    _pipeline(
        "lse of the backward in the wrong base", PREPROCESS, "lse_rows (1)",
        "lse_rows = tl.load(lse + number * M + rows, mask=rows < M, other=0.0)",
    ),
    _pipeline("delta without T * O_t", PREPROCESS, "delta (2)", "pass"),
    _pipeline(
        "stale statistic: mu of the previous row", PREPROCESS, "mu_rows",
        "mu_rows = tl.load(mu + number * M + tl.maximum(rows - 1, 0), mask=rows < M, other=0.0)",
    ),
    _pipeline(
        "dq_accum written as d_q_t", POSTPROCESS, "value_t",
        "value_t = scale_rows(load_dq_accum(dq_accum + first, ROWS, FIRST, REST, TRANSPOSED), factor_t)",
        "hopper_128", "emulated-dq-accum",
    ),
    # Masks
    _pipeline(
        "mask of the first head for all", MASK, "number",
        "number = number + 0 * head if BY_HEAD else number", "hopper_mask",
    ),
    _pipeline(
        "mask of the first keys for all", MASK, "quarter",
        "quarter = gl.arange(0, 4, gl.SliceLayout(0, WORDS)) * rows + 0 * tile", "hopper_mask",
    ),
    _pipeline(
        "bits of a block's first tile for all", MASK, "return gl load",
        "return (gl.load(first + (quarter[None, :] + row[:, None])) >> 0,)", "hopper_mask",
    ),
    _pipeline(
        "keys beyond the end are visible", MASK, "tl.store",
        "tl.store(words + key[:, None], pack_words(tl.trans(seen | (key >= N)[None, :]), SIDE))",
        "hopper_mask_128_low_scores", "emulated-dq-accum",
    ),
    _pipeline(
        "words of a mask for tiles of keys in the place of those for queries", HOPPER + "families.py", "return cls",
        "return cls(DENSE, (words.by_queries, *rest), (words.by_queries, *rest), flags)", "hopper_mask",
    ),
    _pipeline(
        "a mask's row of the first query for all", MASK, "row", "row = row * 0", "hopper_mask",
    ),
    _pipeline(
        "pairs of columns share a bit", MASK, "pair",
        "pair = gl.arange(0, PAIRS, along(BIT_LAYOUT, (1,)))[None, :, None, None]", "hopper_mask",
    ),
    _pipeline(
        "words of queries packed as of keys", MASK, "tl.store",
        "tl.store(words + key[:, None], pack_words(seen, SIDE))", "hopper_mask",
    ),
    _pipeline(
        "words of a tile ahead for all", MAINLOOP, "next_mask",
        "next_mask = load_mask_tile(packed_mask, row, tile, KEYS)", "hopper_mask_plain",
    ),
    _pipeline(
        "a mask of keys alone packed for the first query", MASK, "last",
        "last = tl.where(mask.strides[0] != 0, M, 1)", "hopper_mask_per_key",
    ),
    _pipeline("mask ignored in the backward only", PAIRS, "p", "pass", "hopper_mask_128"),
    _pipeline("row without keys divided by 0", FORWARD, "l", "l = l", "hopper_mask_empty_rows"),
    _pipeline(
        "row without keys has an infinite maximum", FORWARD, "m_safe",
        "m_safe = m_new", "hopper_mask_empty_rows",
    ),
    # Blocks, the pipeline, column chunks and launches
    _pipeline("edge of the keys unmasked", BLOCKS, "limit (1)", "limit = KEYS"),
    _pipeline(
        "keys beyond the end in sums of d_q", BLOCKS, "p (2)", "pass", "hopper_72_low_scores", "emulated-dq-accum",
    ),
    _pipeline(
        "the other consumer's keys beyond the end in sums of d_q", BLOCKS, "p (2)",
        "p = gl.where(key + CONSUMER_ROWS < program.N, p, 0.0)", "hopper_128_low_scores", "emulated-dq-accum",
    ),
    _pipeline(
        "causal off by one", BLOCKS, "limit (2)",
        "limit = gl.minimum(query + 2, limit)[:, None]", "hopper_64_causal",
    ),
    _pipeline(
        "GQA head mapped wrongly", BLOCKS, "return pid blocks (1)",
        "return Block(pid // blocks // heads, head, row0), Loop(head % (heads // group), 1, 0, end, heads)",
        "hopper_64_gqa",
    ),
    _pipeline(
        "group ends after its first head", BLOCKS, "return pid blocks (2)",
        "return Block(pid // blocks // kv_heads, head, row0), Loop(head * group, 1, first, end, heads)",
        "hopper_64_gqa",
    ),
    _pipeline(
        "statistics of the wrong head", PIPELINE, "number",
        "number = batch * query_heads", "hopper_64_gqa",
    ),
    _pipeline(
        "second column chunk read at a wrong column", PIPELINE, "copy_tile",
        "copy_tile(streamed[i], batch, head, row, i % CHUNKS * WIDTH // 2, bar, tiles[i].index(stage))",
        "hopper_72",
    ),
    _pipeline(
        "second column chunk written at a wrong column", RESULTS, "coordinates",
        "coordinates = [block.batch, block.head, block.row0 + consumer * CONSUMER_ROWS, i % CHUNKS * WIDTH // 2]",
        "hopper_72",
    ),
    _pipeline(
        "tile freed before it is read", PIPELINE, "mbarrier.wait",
        "mbarrier.wait(bar, phase ^ 1)", "hopper_64_long",
    ),
    _pipeline(
        "first column chunk left out of the scores", CHUNKS, "acc",
        "acc = warpgroup_mma(_addressed(x[i]), addressed_here(y[i]).permute((1, 0)), acc, use_acc=USE_ACC, "
        "is_async=True)",
        "hopper_72",
    ),
    _pipeline(
        "every tensor taken for contiguous", HOPPER + "descriptors.py", "shape, strides",
        "shape, strides = list(x.shape), list(x.contiguous().stride())", "hopper_sequence_major",
    ),
    _pipeline(
        "second column chunk left out", HOPPER + "described.py", "chunks",
        "chunks = [] if x is None else rows_descriptors(x, rows, widths[:1])", "hopper_72",
    ),
    _pipeline(
        "last keys without a program", LAUNCH, "self._launch",
        "self._launch(kernel, family, max(1, self.given.call.key_programs(BLOCK_ROWS) - 1), (*args, "
        "*self.seen.by_queries), **flags)",
    ),
]  # fmt: skip
