"""The planted bugs of what runs on GPUs alone: warp-specialised kernels, replayed calls and direct launches."""

from .fault import Fault

HOPPER = "kernels/hopper/"
FORWARD, QUERY, KEY = HOPPER + "forward.py", HOPPER + "backward_query.py", HOPPER + "backward_key.py"
VALUE, PAIRS, STATISTICS = HOPPER + "backward_value.py", HOPPER + "backward_pairs.py", HOPPER + "backward_preprocess.py"
SUMS = HOPPER + "dq_accum.py"
RING, CHUNKS, LAUNCH = HOPPER + "pipeline.py", HOPPER + "chunks.py", HOPPER + "launch.py"
BITS, RESCALED = HOPPER + "packed_mask.py", HOPPER + "per_tensor_scaling.py"
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
    _pipeline("alpha dropped from l", FORWARD, "l * alpha + mass", "l + mass"),
    _pipeline(
        "a warp asks whether half of its rows moved", CHUNKS,
        "setp.neu.or.f32 p, ${2 * count + 2}", "setp.neu.or.f32 p, ${2 * count}", "hopper_64_long",
    ),
    _pipeline("rescaled where no row moved", CHUNKS, "@!p bra.uni SAME", "@p bra.uni SAME"),
    _pipeline(
        "the maximum follows late, what was summed at once", FORWARD,
        "alpha = gl.exp2(m - finite)", "alpha = gl.exp2(m - gl.maximum(m, top * scale2))", "hopper_64",
        "emulated-bfloat16",
    ),
    _pipeline("mu not subtracted", FORWARD, "(s_t * scale - c[:, None])", "(s_t * scale)"),
    _pipeline(
        "o_t centred on a stale mean", FORWARD,
        "plus(complete(acc_o_t), times(acc_o, back))", "complete(acc_o_t)", "hopper_72",
    ),
    _pipeline(
        "scale missing from the mean", FORWARD,
        "sum_of_products(p, s_t, 8, TILE) * scale", "sum_of_products(p, s_t, 8, TILE)",
    ),
    _pipeline(
        "tangent of v ignored", FORWARD,
        "acc_o_t = add_product(plus(acc_o_t, times(acc_o, back)), weights, v_t)",
        "acc_o_t = plus(acc_o_t, times(acc_o, back))",
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
    _pipeline("G and T swapped", QUERY, "q, G, q_t, T = own", "q, T, q_t, G = own"),
    _pipeline("scale missing from d_q", QUERY, "scaled(accs, scale)", "accs", "hopper_64_plain"),
    # Key-side backward
    _pipeline("row_a dropped", KEY, "centred = a - row_a", "centred = a"),
    _pipeline("delta dropped without tangents", KEY, "(p * (b - delta))", "(p * b)", "hopper_128_plain"),
    _pipeline("d_k from q for q_t", KEY, "add_product(acc_k, weights_t, q_t)", "add_product(acc_k, weights_t, q)"),
    _pipeline("gradient without T v_t.T", KEY, "b = add_scores(b, v_t, T)", "pass", "hopper_72"),
    _pipeline("scale missing from d_k", KEY, "else accs[i] * scale", "else accs[i]"),
    _pipeline("causal off by one in the backward", KEY, "key <= query", "key < query", "hopper_64_causal"),
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
        "d_q without dS_t k_t", PAIRS, "sums[0] + place, total + rest)", "sums[0] + place, total)", "hopper_128",
        "emulated-sums",
    ),
    _pipeline(
        "sums of the first tile of queries for all", PAIRS, "other_head + member) * last + tile",
        "other_head + member) * last + first", "hopper_128", "emulated-sums",
    ),
    _pipeline(
        "dS of one consumer for both", PAIRS, "at % SLOTS * 2 + half +", "at % SLOTS * 2 + who +",
        "hopper_128", "emulated-sums",
    ),
    _pipeline(
        "d_q with dS k_t", SUMS,
        "_with_keys(total, deltas, k_t[OTHER], at, 1)", "_with_keys(total, deltas, k_t[OTHER], at, 0)",
        "hopper_72", "emulated-sums",
    ),
    _pipeline(
        "d_q_t from dS", SUMS, "deltas, k[who], at, 1,", "deltas, k[who], at, 0,", "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "chunks of d_q over one another", SUMS, "sums[0] + (tile + OTHER * HALF * FIRST)", "sums[0] + (tile)",
        "hopper_72", "emulated-sums",
    ),
    _pipeline(
        "padding counted in the sums of a tile", SUMS, "index.to(gl.int64) * (HALF * COLUMNS)",
        "index.to(gl.int64) * (HALF * FIRST)", "hopper_72", "emulated-sums",
    ),
    _pipeline(
        "dS_t of a tile's second part over that of its first", SUMS,
        "2 + who + (at >> 30)).slice(PART * ROWS, ROWS, 1)", "2 + who + (at >> 30)).slice(0, ROWS, 1)",
        "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "dS overwritten before it is summed", SUMS, "mbarrier.wait(free.index(slot), (at // SLOTS & 1) ^ 1)", "pass",
        "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "dS read before the other consumer has left it", SUMS, "mbarrier.wait(ready.index(slot), (at // SLOTS) & 1)",
        "pass", "hopper_96", "emulated-sums",
    ),
    _pipeline(
        "query sums of the first head for all of a group", KEY, "(batch * heads + other_head + member) * last + tile",
        "(batch * heads + other_head) * last + tile", "hopper_72_gqa", "emulated-sums",
    ),
    _pipeline(
        "second part of a tile read as the first", RING, "tiles[i].slice(part * (", "tiles[i].slice(0 * (",
        "hopper_96", "emulated-sums",
    ),
    # Row statistics and sums of query gradients
    _pipeline("lse of the backward in the wrong base", STATISTICS, "other=0.0) * 1.4426950408889634", "other=0.0)"),
    _pipeline("delta without T * O_t", STATISTICS, "delta += delta_t", "pass"),
    _pipeline(
        "stale statistic: mu of the previous row", STATISTICS,
        "tl.load(mu + number * M + rows,", "tl.load(mu + number * M + tl.maximum(rows - 1, 0),",
    ),
    _pipeline(
        "sums of d_q written as d_q_t", STATISTICS, "load_sums(sums_t + first,", "load_sums(sums + first,",
        "hopper_128", "emulated-sums",
    ),
    # Masks
    _pipeline("mask of the first head for all", BITS, "number + head if", "number + 0 * head if", "hopper_mask"),
    _pipeline("mask of the first keys for all", BITS, "tile * COLUMNS // 128 * step", "0 * tile", "hopper_mask"),
    _pipeline("bits of a block's first tile for all", BITS, "(tile * COLUMNS % 128 // 4)", "0", "hopper_mask"),
    _pipeline("pairs of columns share a bit", BITS, "None, None] * 2", "None, None]", "hopper_mask"),
    _pipeline("words of queries packed as of keys", BITS, "words_of(tl.trans(seen)", "words_of(seen", "hopper_mask"),
    _pipeline("words of a tile ahead for all", FORWARD, "gl.minimum(tile + 1, last - 1)", "tile", "hopper_mask_plain"),
    _pipeline(
        "a mask of keys alone packed for the first query", BITS, "M, m0 + SIDE)", "M, 1)", "hopper_mask_per_key"
    ),
    _pipeline(
        "mask ignored in the backward only", PAIRS, "p = where_allowed(p, words, 0.0, TILE)", "pass", "hopper_mask_128"
    ),
    _pipeline("row without keys divided by 0", FORWARD, "gl.where(l > 0.0, l, 1.0)", "l", "hopper_mask_empty_rows"),
    _pipeline(
        "row without keys has an infinite maximum", FORWARD,
        'gl.where(m_new > float("-inf"), m_new, 0.0)', "m_new", "hopper_mask_empty_rows",
    ),
    # Walks, the ring, column chunks and launches
    _pipeline("edge of the keys unmasked", RING, "limit = N - tile * KEYS", "limit = KEYS"),
    _pipeline(
        "causal off by one", RING,
        "gl.minimum(query + 1, limit)", "gl.minimum(query + 2, limit)", "hopper_64_causal",
    ),
    _pipeline(
        "GQA head mapped wrongly", RING,
        "(head // group, 1, 0, last, heads)", "(head % (heads // group), 1, 0, last, heads)", "hopper_64_gqa",
    ),
    _pipeline("group ends after its first head", RING, "(head * group, group,", "(head * group, 1,", "hopper_64_gqa"),
    _pipeline(
        "statistics of the wrong head", RING,
        "number = batch * heads + other_head + member", "number = batch * heads + other_head", "hopper_64_gqa",
    ),
    _pipeline(
        "second column chunk read at a wrong column", RING,
        "i % CHUNKS * WIDTH], bar, ring", "i % CHUNKS * WIDTH // 2], bar, ring", "hopper_72",
    ),
    _pipeline(
        "second column chunk written at a wrong column", RING,
        "who * HALF, i % CHUNKS * WIDTH]", "who * HALF, i % CHUNKS * WIDTH // 2]", "hopper_72",
    ),
    _pipeline(
        "tile freed before it is read", RING,
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
        "self.given.call.key_programs(OWN)", "max(1, self.given.call.key_programs(OWN) - 1)",
    ),
]  # fmt: skip

OF_RESCALED = [
    _rescaled("scale in true units", RESCALED, "scale * _power(u_q + u_k)", "scale * _power(0 * u_q)"),
    _rescaled("o_t in the unit of o", RESCALED, "_power(u_v + r))", "_power(u_v))"),
    _rescaled("mu saved in its unit", RESCALED, "factors + MU, _power(r)", "factors + MU, _power(0 * r)"),
    _rescaled("d_v with the shift of P", RESCALED, "_power(u_g - SHIFT)", "_power(u_g)"),
    _rescaled("d_q_t in the unit of d_q", RESCALED, "_power(u_t + u_v - u_q", "_power(u_g + u_v - u_q"),
    _rescaled("k_t in a unit of its own", RESCALED, "_power(-u_k - r)", "_power(-u_k - r - 1)"),
    _rescaled("v in the unit of k", RESCALED, "OF_KEYS + 1, _power(-u_v)", "OF_KEYS + 1, _power(-u_k)"),
    _rescaled("two factors in one place", HOPPER + "scales.py", "D_V_T = tl.constexpr(9)", "D_V_T = tl.constexpr(8)"),
    _rescaled("delta in true units", STATISTICS, "delta *= tl.load(factors + OWN_O)", "pass"),
    _rescaled("a in true units", STATISTICS, "row_a *= tl.load(factors + OWN_O)", "pass"),
    _rescaled("shift of P left out", STATISTICS, "lse_rows -= SHIFT", "pass"),
    _rescaled("sums of d_q_t in the unit of d_q", STATISTICS, "factors + D_Q_T)", "factors + D_Q)", "hopper_128"),
    _rescaled("factor of another tensor", RING, "FIRST + i // CHUNKS * STEP", "FIRST + i * STEP", "hopper_72"),
    _rescaled("half of the columns written twice", RING, "column + COLUMNS], room)", "column], room)", "hopper_72"),
    _rescaled(
        "d_k_t with the factor of d_v", KEY, "D_K, 1 if VALUES else 2)", "D_K, 1)", "hopper_72", "rescaled-in-order"
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
