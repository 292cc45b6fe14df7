"""The planted bugs of the portable kernels, their addresses, masks and launches."""

from .fault import Fault

FORWARD = "kernels/portable/forward.py"
PREPROCESS = "kernels/portable/backward_preprocess.py"
QUERY = "kernels/portable/backward_query.py"
KEY = "kernels/portable/backward_key.py"
TILE = "kernels/portable/backward_tile.py"
TILES = "kernels/tiles.py"
KERNELS = "backends/triton.py"

OF_KERNELS = [
    # Forward and JVP
    Fault("alpha dropped from l", "forward", FORWARD, "l", "l = l + tl.sum(p, 1)", "lengths_33_257", "permutation"),
    Fault(
        "alpha not applied to acc_o", "forward", FORWARD, "acc_o",
        "acc_o = add_product(acc_o, p, v_rows, PRECISION)", "lengths_33_257",
    ),
    Fault(
        "lse in the wrong base", "forward", FORWARD, "tl.store (3)",
        "tl.store(lse + statistic, (m - tl.log2(norm)), mask=rows < M)", check="merge",
    ),
    Fault(
        "lse without the maximum", "forward", FORWARD, "tl.store (3)",
        "tl.store(lse + statistic, (-tl.log2(norm)) * 0.6931471805599453, mask=rows < M)",
    ),
    Fault(
        "pair without the maximum", "forward", FORWARD, "tl.store (1)",
        "tl.store(lse + statistic * 2, m * 0, mask=rows < M)", check="shift",
    ),
    Fault("guard of empty rows dropped", "forward", FORWARD, "m_safe", "m_safe = m_new", "mask_bool_empty_rows"),
    Fault("last key tile dropped", "forward", FORWARD, "end", "end = (N // BLOCK_N) * BLOCK_N", "lengths_33_257"),
    Fault(
        "GQA head mapped wrongly", "forward", FORWARD, "kv_head", "kv_head = head % (heads // group)",
        "mask_gqa_per_head",
    ),
    Fault("running mean not moved", "jvp", FORWARD, "mean", "mean += step * 0.0", "lengths_33_257"),
    Fault("alpha not applied to acc_o_t", "jvp", FORWARD, "acc_o_t (1)", "acc_o_t = acc_o_t", "lengths_33_257"),
    Fault("acc_o_t centred on a stale mean", "jvp", FORWARD, "acc_o_t (2)", "acc_o_t = acc_o_t", "lengths_33_257"),
    Fault(
        "mean of absolute values", "jvp", FORWARD, "step",
        "step = tl.sum(p * tl.abs(s_t), 1) / tl.where(l == 0.0, 1.0, l)", check="linear",
    ),
    Fault(
        "mu not subtracted", "jvp", FORWARD, "acc_o_t (3)",
        "acc_o_t = add_product(acc_o_t, p * s_t, v_rows, PRECISION)",
    ),
    Fault("scale missing from the score tangent", "jvp", FORWARD, "s_t", "s_t = s_t - mean[:, None]"),
    Fault("tangent of v ignored", "jvp", FORWARD, "if len v_t", "if len(v_t) > 2:"),
    Fault(
        "missing tangent taken for the primal", "jvp", FORWARD, "args",
        "args = (*call.operands(*inputs._replace(k_t=inputs.k if inputs.k_t is None else inputs.k_t)), "
        "call.mask, call.mask_t, call.seed, *call.operands(o, o_t), lse, mu)",
        "tangents_q",
    ),
    Fault(
        "tangents read with the strides of their primals", "jvp", FORWARD, "args",
        "x = call.operands(*inputs)\n"
        "x = (*x[:3], *(t and (t[0], (t[1][0], p[1][1]), t[2]) for p, t in zip(x[:3], x[3:])))\n"
        "args = (*x, call.mask, call.mask_t, call.seed, *call.operands(o, o_t), lse, mu)",
        "layout_expanded",
    ),
    # Row sums
    Fault("delta without T * O_t", "preprocess", PREPROCESS, "delta (2)", "pass"),
    Fault("delta without G * O", "preprocess", PREPROCESS, "delta (1)", "pass"),
    Fault(
        "only the first chunk of columns summed", "preprocess", PREPROCESS, "for i tl",
        "for i in tl.static_range(len(x), len(x)):", "dims_72_72",
    ),
    # What both backward kernels share
    Fault("mu dropped", "both sides", TILE, "return p p", "return (p, p * (s_t * scale))"),
    Fault("row_a dropped", "both sides", TILE, "centred", "pass"),
    Fault(
        "row_delta dropped", "both sides", TILE, "ds (1)",
        "ds = p[0] * (b - 0.0 * _statistic(row_delta, KEYS_FIRST))", check="adjoint",
    ),
    Fault("sign of row_delta", "both sides", TILE, "ds (1)", "ds = p[0] * (b + _statistic(row_delta, KEYS_FIRST))"),
    Fault("dS without P_t (A - a)", "both sides", TILE, "ds (2)", "pass"),
    Fault("tangent of v ignored in the backward", "both sides", TILE, "SECOND", "SECOND: tl.constexpr = 0"),
    Fault("tangent of q ignored in the backward", "both sides", TILE, "FIRST", "FIRST: tl.constexpr = 0"),
    Fault(
        "mask ignored in the backward alone", "both sides", TILE, "s (2)",
        "s = biased_scores(s, scale, (), m0, n0, row, column, M, N, at_border, MASK_LAYOUT, EDGE, DIAGONAL)",
        "mask_bool_full",
    ),
    Fault(
        "stale statistic: row_a of the previous row", "key side", KEY, "ds",
        "ds = score_gradients(p, v, v_t, G, T, (row_a, first, tl.maximum(row - 1, 0), inside), (row_delta, "
        "first, row, inside), kept, True, PRECISION)",
    ),
    Fault("lse of an empty row left at -inf", "both sides", TILE, "lse2", "lse2 = lse2", "mask_bool_empty_rows"),
    # Query-side backward
    Fault("G and T swapped", "query side", QUERY, "query", "query = (q_rows, q_t_rows, T, G)"),
    Fault("d_q without dS_t k_t", "query side", QUERY, "acc_q", "acc_q = acc_q", check="differences"),
    Fault("scale squared", "query side", QUERY, "factor", "factor = tl.zeros([BLOCK_M], tl.float32) + scale * scale"),
    Fault(
        "diagonal tiles taken for full ones", "query side", QUERY, "full",
        "full = (tl.minimum(N, m0 + BLOCK_M) // BLOCK_N) * BLOCK_N", "causal_64_64",
    ),
    Fault(
        "v of the wrong key head", "query side", QUERY, "key",
        "key = (select_rows(k, batch, kv_head, batch_shape, start_k, REGULAR), select_rows(k_t, batch, kv_head, "
        "batch_shape, start_k, REGULAR), select_rows(v, batch, tl.maximum(kv_head - 1, 0), batch_shape, start_k, "
        "REGULAR), select_rows(v_t, batch, kv_head, batch_shape, start_k, REGULAR))",
        "mask_gqa_per_head", "slices",
    ),
    # Key-side backward
    Fault("d_v without P_t.T @ T", "key side", KEY, "acc_v", "acc_v = acc_v"),
    Fault("d_k without dS_t.T @ q_t", "key side", KEY, "acc_k", "acc_k = acc_k", check="agreement"),
    Fault(
        "scale missing from d_k_t", "key side", KEY, "store_rows",
        "store_rows(d_k_t_head, acc_k_t, n0, N, K_COLUMNS, REGULAR)",
    ),
    Fault(
        "group ends after its first head", "key side", KEY, "for member range",
        "for member in range(1):", "mask_gqa_per_head",
    ),
    Fault(
        "statistics of the wrong head", "key side", KEY, "base",
        "base = statistics_start + kv_head * statistics_step", "mask_gqa_per_head",
    ),
    Fault(
        "mask of the wrong head", "key side", KEY, "head_mask",
        "head_mask = select_head(mask, batch, kv_head, batch_shape, False)", "mask_gqa_per_head",
    ),
    Fault(
        "first query tile of the diagonal skipped", "key side", KEY, "first",
        "first = (n0 // BLOCK_M + 1) * BLOCK_M", "causal_64_64",
    ),
    # Addressing, masks and launches
    Fault(
        "edge of the keys unmasked", "tiles", TILES, "s (2)",
        's = tl.where(column <= N - n0, s, float("-inf"))', "lengths_1_31",
    ),
    Fault(
        "causal off by one", "tiles", TILES, "s (3)",
        's = tl.where(column <= row + (1 + m0 - n0), s, float("-inf"))', "causal_64_64",
    ),
    Fault(
        "additive mask in the wrong base", "tiles", TILES, "return tl exp2",
        "return tl.exp2(x)", "mask_additive_full",
    ),
    Fault(
        "aligned mask read at its first keys alone", "tiles", TILES, "tile",
        "tile = tl.multiple_of(first + tl.cast(m0, tl.uint32).to(tl.uint64) * stride, 16)", "mask_bool_aligned",
    ),
    Fault(
        "aligned mask without its row", "tiles", TILES, "offsets",
        "offsets = tl.multiple_of(row.to(tl.uint32) * 0, (16, 16)) + column.to(tl.uint32)", "mask_additive_aligned",
    ),
    Fault(
        "last keys of an aligned mask not read", "tiles", TILES, "inside",
        "inside = (row < M - m0) & (column // 16 < (N - n0) // 32)", "mask_bool_aligned",
    ),
    Fault("last chunk of columns dropped", "tiles", TILES, "for i tl", "for i in tl.static_range(1):", "dims_72_72"),
    Fault(
        "last row of a partial tile never written", "tiles", TILES, "keep",
        "keep = rows[:, None] < limit - first - 1",
    ),
    Fault(
        "stride of the wrong batch dim", "tiles", TILES, "offset",
        "offset += (batch % size).to(tl.int64) * from_odd(x.strides[2])", "batch_many",
    ),
    Fault(
        "strided columns read as contiguous", "launch", "kernels/launch/call.py", "if strides x",
        "if False:", "layout_column_major",
    ),
    Fault(
        "stride of the heads lost", "launch", "kernels/launch/geometry.py", "packed",
        "packed = (row, odd(0), *(map(odd, reversed(batch)) if batch else (odd(0),)))", "mask_gqa_per_head",
    ),
    Fault(
        "every tensor taken for contiguous", "launch", "kernels/launch/call.py", "packed, _, is_regular, special",
        'packed, _, is_regular, special = layout(torch.empty(x.shape, device="meta").stride(), x.dtype)',
        "layout_sequence_major",
    ),
    Fault(
        "mask read at its first key alone", "launch", "kernels/launch/call.py", "return found column",
        "return found, (0, False, additive, True)", "mask_bool_full",
    ),
    Fault(
        "gradients of tangents left unwritten", "launch", KERNELS, "return x torch",
        "return None if x is None else empty_rows(x, x.shape[-1])", "cotangent_o_tangents_qkv",
    ),
]  # fmt: skip
