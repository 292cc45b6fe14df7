"""The planted bugs of what runs on GPUs alone: warp-specialised kernels, replayed calls and direct launches."""

from .fault import Fault

HOPPER = "kernels/hopper/"
FORWARD, QUERY, KEY = HOPPER + "forward.py", HOPPER + "backward_query.py", HOPPER + "backward_key.py"
VALUE, PAIRS, DQ_ACCUM = HOPPER + "backward_value.py", HOPPER + "backward_pairs.py", HOPPER + "dq_accum.py"
PREPROCESS, POSTPROCESS = HOPPER + "backward_preprocess.py", HOPPER + "backward_postprocess.py"
PIPELINE, BLOCKS, RESULTS = HOPPER + "pipeline.py", HOPPER + "blocks.py", HOPPER + "results.py"
CHUNKS, LAUNCH, MASK = HOPPER + "chunks.py", HOPPER + "launch.py", HOPPER + "packed_mask.py"
SCALING = HOPPER + "per_tensor_scaling.py"
REPLAY, DIRECT = "kernels/launch/replay.py", "kernels/launch/driver.py"


def _pipeline(name: str, file: str, old: str, new: str, case: str = "hopper_64", check: str = "emulated") -> Fault:
    return Fault(f"pipelines: {name}", "pipelines", file, old, new, case, check)


def _rescaled(name: str, file: str, old: str, new: str, case: str = "hopper_64", check: str = "rescaled") -> Fault:
    return Fault(f"rescaled: {name}", "pipelines", file, old, new, case, check)


def _repeated(name: str, file: str, old: str, new: str, case: str = "hopper_heads") -> Fault:
    return Fault(name, "repeated calls", file, old, new, case, "played")


OF_PIPELINES = [
    # Forward and JVP
    _pipeline("lse in the wrong base", FORWARD, "lse * 0.6931471805599453", "lse"),
    _pipeline("alpha dropped from l", FORWARD, "l * alpha + tile_sum", "l + tile_sum"),
    _pipeline(
        "a warp asks whether half of its rows moved", CHUNKS,
        "setp.neu.or.f32 p, ${2 * count + 2}", "setp.neu.or.f32 p, ${2 * count}", "hopper_64_long",
    ),
    _pipeline("lazy rescale where no row moved", CHUNKS, "@!p bra.uni SAME", "@p bra.uni SAME"),
    _pipeline(
        "the maximum follows lazily, what was summed at once", FORWARD,
        "alpha = gl.exp2(m - m_safe)", "alpha = gl.exp2(m - gl.maximum(m, tile_max * scale2))", "hopper_64",
        "emulated-bfloat16",
    ),
    _pipeline("mu not subtracted", FORWARD, "(s_t * scale - mean[:, None])", "(s_t * scale)"),
    _pipeline(
        "o_t centred on a stale mean", FORWARD,
        "add(complete(acc_o_t), scale_rows(acc_o, negative_step))", "complete(acc_o_t)", "hopper_72",
    ),
    _pipeline(
        "scale missing from the mean", FORWARD,
        "sum_of_products(p, s_t, 8, TILE) * scale", "sum_of_products(p, s_t, 8, TILE)",
    ),
    _pipeline(
        "tangent of v ignored", FORWARD,
        "acc_o_t = add_product(add(acc_o_t, scale_rows(acc_o, negative_step)), weights, v_t)",
        "acc_o_t = add(acc_o_t, scale_rows(acc_o, negative_step))",
    ),
    _pipeline(
        "S_t without q k_t", FORWARD, "s_t = add_scores(s_t, q, k_t)", "s_t = add_scores(s_t, q_t, k_t)", "hopper_128",
    ),
    _pipeline(
        "a wait for products one too short", FORWARD,
        "s_t = warpgroup_mma_wait(CHUNKS if EARLY else 0, deps=[s_t])\n",
        "warpgroup_mma_wait(CHUNKS, deps=[s_t])\n    s_t = zero if s_t.result is None else s_t.result\n", "hopper_64",
    ),
    # Query-side backward
    _pipeline("mu dropped", QUERY, "(s_t * scale - mu) * centred", "(s_t * scale) * centred"),
    _pipeline("delta dropped", QUERY, "centred - delta", "centred", "hopper_72"),
    _pipeline("G and T swapped", QUERY, "q, G, q_t, T = resident", "q, T, q_t, G = resident"),
    _pipeline("scale missing from d_q", QUERY, "scaled(accs, scale)", "accs", "hopper_64_plain"),
    # Key-side backward
    _pipeline("row_a dropped", KEY, "centred = a - row_a", "centred = a"),
    _pipeline("delta dropped without tangents", KEY, "(p * (b - delta))", "(p * b)", "hopper_128_plain"),
    _pipeline("d_k from q for q_t", KEY, "add_product(acc_k, weights_t, q_t)", "add_product(acc_k, weights_t, q)"),
    _pipeline("gradient without T v_t.T", KEY, "b = add_scores(b, v_t, T)", "pass", "hopper_72"),
    _pipeline("scale missing from d_k", KEY, "else accs[i] * scale", "else accs[i]"),
    _pipeline("causal off by one in the backward", BLOCKS, "key <= query", "key < query", "hopper_64_causal"),
    _pipeline("scale missing from S_t of d_v", VALUE, "s_t * scale - mu", "s_t - mu", "hopper_72"),
    _pipeline("G and T swapped in d_v", VALUE, "q, G, q_t, T = streamed", "q, T, q_t, G = streamed", "hopper_128"),
    # Key and query gradients in one kernel
    _pipeline("the tiles of a pair exchanged", PAIRS, "x, y = gl.split(", "y, x = gl.split(", "hopper_128"),
    _pipeline(
        "q_t and q exchanged in a pair", PAIRS,
        "return pair.slice(0, ROWS, 0), pair.slice(ROWS, ROWS, 0)",
        "return pair.slice(ROWS, ROWS, 0), pair.slice(0, ROWS, 0)", "hopper_128",
    ),
    _pipeline(
        "d_q without dS_t k_t", PAIRS,
        "dq_accum[0] + offset, total + rest)", "dq_accum[0] + offset, total)", "hopper_128", "emulated-sums",
    ),
    _pipeline(
        "dq_accum of the first tile of queries for all", PAIRS, "streamed_head + member) * last + tile",
        "streamed_head + member) * last + first", "hopper_128", "emulated-sums",
    ),
    _pipeline(
        "dS of one consumer for both", PAIRS,
        "BUFFER_STAGES * 2 + source +", "BUFFER_STAGES * 2 + consumer +", "hopper_128", "emulated-sums",
    ),
    _pipeline(
        "d_q with dS k_t", DQ_ACCUM,
        "ds_tiles, k_t[OTHER], iteration, 1)", "ds_tiles, k_t[OTHER], iteration, 0)",
        "hopper_72", "emulated-sums",
    ),
    _pipeline(
        "d_q_t from dS", DQ_ACCUM,
        "ds_tiles, k[consumer], iteration, 1,", "ds_tiles, k[consumer], iteration, 0,", "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "chunks of d_q over one another", DQ_ACCUM,
        "dq_accum[0] + (tile + OTHER * CONSUMER_ROWS * FIRST)", "dq_accum[0] + (tile)",
        "hopper_72", "emulated-sums",
    ),
    _pipeline(
        "padding counted in the dq_accum of a tile", DQ_ACCUM,
        "gl.int64) * (CONSUMER_ROWS * COLUMNS)", "gl.int64) * (CONSUMER_ROWS * FIRST)", "hopper_72", "emulated-sums",
    ),
    _pipeline(
        "dS_t of a tile's second sub-tile over that of its first", DQ_ACCUM,
        "2 + consumer + (iteration >> 30)).slice(SUB_TILE * ROWS, ROWS, 1)",
        "2 + consumer + (iteration >> 30)).slice(0, ROWS, 1)",
        "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "dS overwritten before it is summed", DQ_ACCUM,
        "mbarrier.wait(free.index(buffer), (iteration // BUFFER_STAGES & 1) ^ 1)", "pass", "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "dS read before the other consumer has stored it", DQ_ACCUM,
        "mbarrier.wait(ready.index(buffer), (iteration // BUFFER_STAGES) & 1)", "pass", "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "dq_accum of the first head for all of a group", KEY,
        "(batch * heads + streamed_head + member) * last + tile", "(batch * heads + streamed_head) * last + tile",
        "hopper_72_gqa", "emulated-sums",
    ),
    _pipeline(
        "second sub-tile read as the first", PIPELINE, "tiles[i].slice(sub_tile * (", "tiles[i].slice(0 * (",
        "hopper_96", "emulated-sums",
    ),
    # Preprocess and postprocess of the backward
    _pipeline("lse of the backward in the wrong base", PREPROCESS, "other=0.0) * 1.4426950408889634", "other=0.0)"),
    _pipeline("delta without T * O_t", PREPROCESS, "delta += delta_t", "pass"),
    _pipeline(
        "stale statistic: mu of the previous row", PREPROCESS,
        "tl.load(mu + number * M + rows,", "tl.load(mu + number * M + tl.maximum(rows - 1, 0),",
    ),
    _pipeline(
        "dq_accum written as d_q_t", POSTPROCESS,
        "load_dq_accum(dq_t_accum + first,", "load_dq_accum(dq_accum + first,",
        "hopper_128", "emulated-sums",
    ),
    # Masks
    _pipeline("mask of the first head for all", MASK, "number + head if", "number + 0 * head if", "hopper_mask"),
    _pipeline("mask of the first keys for all", MASK, "tile * COLUMNS // 128 * step", "0 * tile", "hopper_mask"),
    _pipeline("bits of a block's first tile for all", MASK, "(tile * COLUMNS % 128 // 4)", "0", "hopper_mask"),
    _pipeline("pairs of columns share a bit", MASK, "None, None] * 2", "None, None]", "hopper_mask"),
    _pipeline("words of queries packed as of keys", MASK, "words(tl.trans(seen)", "words(seen", "hopper_mask"),
    _pipeline("words of a tile ahead for all", FORWARD, "gl.minimum(tile + 1, last - 1)", "tile", "hopper_mask_plain"),
    _pipeline(
        "a mask of keys alone packed for the first query", MASK, "M, m0 + SIDE)", "M, 1)", "hopper_mask_per_key"
    ),
    _pipeline(
        "mask ignored in the backward only", PAIRS,
        "p = where_allowed(p, mask_tile, 0.0, TILE)", "pass", "hopper_mask_128",
    ),
    _pipeline("row without keys divided by 0", FORWARD, "gl.where(l > 0.0, l, 1.0)", "l", "hopper_mask_empty_rows"),
    _pipeline(
        "row without keys has an infinite maximum", FORWARD,
        'gl.where(m_new > float("-inf"), m_new, 0.0)', "m_new", "hopper_mask_empty_rows",
    ),
    # Blocks, the pipeline, column chunks and launches
    _pipeline("edge of the keys unmasked", BLOCKS, "limit = N - tile * KEYS", "limit = KEYS"),
    _pipeline(
        "causal off by one", BLOCKS,
        "gl.minimum(query + 1, limit)", "gl.minimum(query + 2, limit)", "hopper_64_causal",
    ),
    _pipeline(
        "GQA head mapped wrongly", BLOCKS,
        "(head // group, 1, 0, last, heads)", "(head % (heads // group), 1, 0, last, heads)", "hopper_64_gqa",
    ),
    _pipeline("group ends after its first head", BLOCKS, "(head * group, group,", "(head * group, 1,", "hopper_64_gqa"),
    _pipeline(
        "statistics of the wrong head", PIPELINE,
        "number = batch * heads + streamed_head + member", "number = batch * heads + streamed_head", "hopper_64_gqa",
    ),
    _pipeline(
        "second column chunk read at a wrong column", PIPELINE,
        "i % CHUNKS * WIDTH], bar, pipeline", "i % CHUNKS * WIDTH // 2], bar, pipeline", "hopper_72",
    ),
    _pipeline(
        "second column chunk written at a wrong column", RESULTS,
        "CONSUMER_ROWS, i % CHUNKS * WIDTH]", "CONSUMER_ROWS, i % CHUNKS * WIDTH // 2]", "hopper_72",
    ),
    _pipeline(
        "tile freed before it is read", PIPELINE,
        "mbarrier.wait(empty.index(stage),", "mbarrier.wait(full.index(stage),", "hopper_64_long",
    ),
    _pipeline(
        "first column chunk left out of the scores", CHUNKS,
        "use_acc=USE_ACC or i > 0", "use_acc=USE_ACC", "hopper_72",
    ),
    _pipeline(
        "every tensor taken for contiguous", HOPPER + "descriptors.py",
        "    shape, strides = list(x.shape), list(x.stride())\n",
        "    shape, strides = list(x.shape), list(x.contiguous().stride())\n", "hopper_sequence_major",
    ),
    _pipeline(
        "last keys without a program", LAUNCH,
        "self.given.call.key_programs(BLOCK_ROWS)", "max(1, self.given.call.key_programs(BLOCK_ROWS) - 1)",
    ),
]  # fmt: skip

OF_RESCALED = [
    _rescaled("softmax scale of the unscaled tensors", SCALING, "scale * _power(u_q + u_k)", "scale * _power(0 * u_q)"),
    _rescaled("o_t with the scale of o", SCALING, "_power(u_v + r))", "_power(u_v))"),
    _rescaled("mu saved scaled", SCALING, "tensor_scales + MU, _power(r)", "tensor_scales + MU, _power(0 * r)"),
    _rescaled("d_v with the exponent of P", SCALING, "_power(u_do - P_EXPONENT)", "_power(u_do)"),
    _rescaled("d_q_t with the scale of d_q", SCALING, "_power(u_do_t + u_v - u_q", "_power(u_do + u_v - u_q"),
    _rescaled("k_t with a scale of its own", SCALING, "_power(-u_k - r)", "_power(-u_k - r - 1)"),
    _rescaled("v with the scale of k", SCALING, "KEY_SIDE + 1, _power(-u_v)", "KEY_SIDE + 1, _power(-u_k)"),
    _rescaled("two scales in one place", HOPPER + "scales.py", "D_V_T = tl.constexpr(9)", "D_V_T = tl.constexpr(8)"),
    _rescaled("delta unscaled", PREPROCESS, "delta *= tl.load(tensor_scales + INVERSE_O)", "pass"),
    _rescaled("a unscaled", PREPROCESS, "row_a *= tl.load(tensor_scales + INVERSE_O)", "pass"),
    _rescaled("exponent of P left out", PREPROCESS, "lse_rows -= P_EXPONENT", "pass"),
    _rescaled(
        "dq_accum of d_q_t with the scale of d_q", POSTPROCESS, "tensor_scales + D_Q_T)", "tensor_scales + D_Q)",
        "hopper_128",
    ),
    _rescaled("scale of another tensor", RESULTS, "FIRST + i // CHUNKS * STEP", "FIRST + i * STEP", "hopper_72"),
    _rescaled("half of the columns written twice", RESULTS, "column + COLUMNS], tile)", "column], tile)", "hopper_72"),
    _rescaled(
        "d_k_t with the scale of d_v", KEY, "D_K, 1 if WITH_DV else 2)", "D_K, 1)", "hopper_72", "rescaled-in-order"
    ),
]  # fmt: skip

OF_REPLAY = [
    _repeated(
        "replayed with the addresses of an earlier call", REPLAY,
        "addresses = _addresses(tensors)\n        if not",
        "addresses = vars(self).setdefault('first', _addresses(tensors)).copy()\n        if not",
    ),
    _repeated(
        "first argument taken for the second", REPLAY,
        "Place(position, self._addresses.index(address),", "Place(position, max(self._addresses.index(address), 1),",
    ),
    _repeated(
        "replayed at any alignment", REPLAY,
        "if not self._launches or not _are_aligned(addresses):", "if not self._launches:",
    ),
    _repeated("zeros not written", REPLAY, "made.zero_()", "pass", "hopper_cotangent_o"),
    _repeated(
        "replayed with the options of an earlier call", REPLAY,
        "function, options, q.shape", "function, q.shape",
    ),
    _repeated(
        "results contiguous whatever was captured", REPLAY,
        "torch.empty_strided(shape, strides, dtype=dtype, device=device)",
        "torch.empty(shape, dtype=dtype, device=device)",
    ),
    _repeated("guard of tensors ignored", "_torch/guards.py", "if guard.check(*tensors):", "if guard:"),
    _repeated(
        "every head taken for the first", DIRECT,
        "values[position] = addresses[source] if strides is None else (addresses[source], strides)",
        "values[position] = addresses[source] if strides is None else (addresses[source], (strides[0], *(3,) * 2))",
        "short_heads",
    ),
    _repeated(
        "descriptors found by geometry alone", DIRECT,
        "encoder[addresses[source]]", "encoder[next(iter(encoder), addresses[source])]",
    ),
    _repeated(
        "encoders shared by tiles of other sizes", DIRECT,
        "repr((descriptor.shape, descriptor.strides, signature, meta))", "repr((descriptor.shape, descriptor.strides))",
    ),
    _repeated(
        "encoders shared by tensors of other strides", DIRECT,
        "repr((descriptor.shape, descriptor.strides, signature, meta))", "repr((descriptor.shape, signature, meta))",
    ),
]  # fmt: skip
