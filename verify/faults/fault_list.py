"""The planted bugs, but for those of what runs on GPUs alone (fault_list_gpu.py)."""

from .fault import Fault
from .fault_list_bias import OF_BIAS
from .fault_list_distributed import OF_SEVERAL_PROCESSES
from .fault_list_gpu import OF_HIGH, OF_PIPELINES, OF_REPLAY, OF_SCALING
from .fault_list_packed import OF_PACKED_SEQUENCES
from .fault_list_partial import OF_PARTIAL
from .fault_list_tiled import OF_TILED, TILED
from .fault_list_wide import OF_WIDE

FORWARD, PREPROCESS = "kernels/portable/forward.py", "kernels/portable/backward_preprocess.py"
QUERY, KEY, TILE = (
    "kernels/portable/backward_query.py",
    "kernels/portable/backward_key.py",
    "kernels/portable/backward_tile.py",
)
BIAS, DROPOUT = "kernels/portable/backward_bias.py", "kernels/portable/dropout.py"
TILES, KERNELS = "kernels/tiles.py", "backends/triton.py"

_OF_KERNELS = [
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

OPERATORS, AUTOGRAD = "dispatch/operators.py", "dispatch/autograd.py"
TANGENTS = "dispatch/tangents.py"
_OF_WIRING = [
    Fault("tangents dropped silently", "wiring", AUTOGRAD, "if duals", "if False:", check="forward_ad"),
    Fault(
        "tangent of v dropped", "wiring", AUTOGRAD, "(q, q_t), (k, k_t), (v, v_t)",
        '(q, q_t), (k, k_t), (v, v_t) = split("q", q), split("k", k), (split("v", v)[0], None)',
        check="forward_ad",
    ),
    Fault(
        "tangent of o without a graph", "wiring", AUTOGRAD, "return _torch make_dual",
        "return _torch.make_dual(o, o_t.detach()), lse", check="forward_ad",
    ),
    Fault(
        "d_k and d_v exchanged", "wiring", AUTOGRAD, "grads (1)",
        "d_q, d_v, d_k, d_mask = ctx.gradients(BACKWARD, (d_o, *ctx.saved_tensors), tuple(wanted))\n"
        "grads = (d_q, d_k, d_v, d_mask)",
        "plain",
    ),
    Fault(
        "gradients of primals and tangents exchanged", "wiring", AUTOGRAD, "return grads",
        "return None, None, *grads[3:6], *grads[:3], *grads[6:], None",
    ),
    Fault(
        "o of an earlier call saved", "wiring", AUTOGRAD, "ctx.save_for_backward",
        'earlier = vars(_ForwardJvp).get("earlier", o)\n'
        "_ForwardJvp.earlier = o\n"
        "ctx.save_for_backward(q, k, v, q_t, k_t, v_t, earlier, o_t, lse, mu, mask, mask_t, seed)",
        check="stateless",
    ),
    Fault(
        "o of the tangent saved as o", "wiring", AUTOGRAD, "ctx.save_for_backward",
        "ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o_t, o, lse, mu, mask, mask_t, seed)",
    ),
    Fault(
        "gradients asked for one place off", "wiring", AUTOGRAD, "_, _, *wanted, _",
        "wanted = [*ctx.needs_input_grad[1:7], *ctx.needs_input_grad[8:10]]",
    ),
    Fault(
        "cotangent of o_t dropped", "wiring", AUTOGRAD, "grads (2)",
        "grads = ctx.gradients(BACKWARD_JVP, (d_o, None, *ctx.saved_tensors), tuple(wanted))",
    ),
    Fault(
        "recorded backward gives tangents first", "wiring", AUTOGRAD, "grads (3)",
        "grads = _redispatch_in_node(operator, keyset, operator.split((*args, wanted)), fwd_grad)\n"
        "grads = (*grads[3:6], *grads[:3], *grads[6:])",
        check="func.grad",
    ),
    Fault(
        "outer levels cannot record", "wiring", "_torch/levels.py", "with torch enable_grad",
        "with _torch.set_fwd_grad_enabled(fwd_grad):", check="outer-level",
    ),
    Fault(
        "second backward silently zero", "wiring", AUTOGRAD, "raise second_order ctx",
        "return (None,) * len(ctx.needs_input_grad)", check="second-order",
    ),
    Fault(
        "JVP of a JVP silently zero", "wiring", AUTOGRAD, "raise second_order FORWARD_JVP",
        "pass", check="second-order",
    ),
    Fault(
        "JVP of a backward silently zero", "wiring", AUTOGRAD, "raise second_order operator",
        "pass", check="second-order",
    ),
    Fault(
        "backward inside a dual level silent", "wiring", AUTOGRAD, "if ctx in_level",
        "if False:", check="second-order",
    ),
    Fault(
        "func.jvp with the tangent of v dropped", "wiring", "dispatch/func_jvp.py", "tangents.append",
        "tangents.append(None if len(tangents) == 2 else _tangent(x, level))", check="forward-mode",
    ),
    Fault(
        "func.jvp gives o as its own tangent", "wiring", "dispatch/func_jvp.py", "return _torch make_dual",
        "return _torch.make_dual(o, o)", check="func.jvp",
    ),
    Fault(
        "short way with the options of an earlier call", "repeated calls", "dispatch/fast_path.py",
        "return operator options",
        "return operator, enable_gqa, autocast, q.shape, k.shape, *nested", check="repeated",
    ),
    Fault(
        "short way with the tensors of an earlier call", "repeated calls", OPERATORS, "return tensors function",
        "return lambda tensors: function(*operands, *rest, *wanted)", "plain", "repeated",
    ),
    Fault(
        "short way with the default scale", "repeated calls", "dispatch/fast_path.py", "run",
        "run = _run(operator, canonical, given, Options(*options)._replace(scale=None), changes)", check="repeated",
    ),
    Fault(
        "short way back with the options of an earlier call", "repeated calls", "dispatch/fast_path.py", "gradients",
        'gradients = vars(derivatives).setdefault("first", _BoundGradients(options))', check="repeated",
    ),
    Fault("vmap over the wrong dim", "wiring", OPERATORS, "moved.append", "moved.append(x)", "square", "func.vmap"),
    Fault(
        "vmap left with the mapped dim in its place", "wiring", "dispatch/func_vmap.py", "return x movedim", "return x",
        "square", "func.vmap",
    ),
    Fault(
        "default scale from the width of v", "wiring", OPERATORS, "return getattr module",
        "return getattr(module, operator.name), options.of_backend(operands.v)", "dims_64_24",
    ),
    Fault(
        "causal option lost", "wiring", "api.py", "o, o_t",
        "o, o_t = derivatives.attention_jvp(operands, Options(False, _scale(scale), backend))", "causal_64_64",
    ),
]  # fmt: skip

_OF_SITUATIONS = [
    # Cotangents or tangents that are mapped alone
    Fault(
        "expanded statistics read as contiguous", "launch", "kernels/launch/argument.py", "x",
        "pass", "causal_33_80", "func.vjp-mapped",
    ),
    Fault(
        "expanded statistics of an additive mask read as contiguous", "launch", "kernels/launch/argument.py", "x",
        "pass", "gqa_short", "vectorized",
    ),
    Fault(
        "mapped tangents silently zero", "wiring", AUTOGRAD, "o, lse",
        "o, lse = FORWARD.handle(*operands.plain, *options)\n"
        "o_t = torch.zeros_like(o_t)",
        "gqa_short", "vectorized",
    ),
    # Masks that are no plain numbers
    Fault(
        "lower right taken for upper left", "wiring", "causal_bias.py", "if bias variant",
        "if True:", "gqa_short", "causal-bias",
    ),
    Fault(
        "lower right off by one", "wiring", "causal_bias.py", "return torch ones",
        "return torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows + 1), False",
        "gqa_short", "causal-bias",
    ),
    # Learned biases
    Fault(
        "tangent of a mask dropped", "wiring", "dispatch/func_jvp.py", "options",
        'options |= {"attn_mask": primals.pop(), "attn_mask_t": [tangents.pop(), None][1]}',
        "gqa_short", "learned-bias",
    ),
    Fault(
        "gradient of a mask with the softmax scale", "both sides", BIAS, "total",
        "total += ds[0] * scale", "gqa_short", "learned-bias",
    ),
    Fault(
        "gradient of a mask of the first head alone", "both sides", BIAS, "for i range",
        "for i in range(1):", "mask_gqa_per_head", "broadcast-bias",
    ),
    Fault(
        "tangent of a mask with the softmax scale", "jvp", FORWARD, "bias_t",
        "bias_t = (bias_t + s_t) * scale", "gqa_short", "learned-bias",
    ),
    Fault(
        "tangent of a mask read a key too far", "tiles", "kernels/portable/bias_tangent.py", "offsets",
        "offsets = row.to(tl.int64) * row_stride + (column + 1) * COLUMN_STRIDE", "gqa_short", "learned-bias",
    ),
    Fault(
        "tangent of a mask missing in the backward pass", "both sides", TILE, "return p bias_t",
        "return (p, p * (s_t * scale - _statistic(mu, KEYS_FIRST)))", "gqa_short", "learned-bias",
    ),
    Fault(
        "gradient of a mask lost in tiled", "tiled", "backends/tiled_grid.py", "tile.add_",
        "pass", "gqa_short", "learned-bias",
    ),
    # Dropout
    Fault(
        "another mask of dropout in the kernels", "both sides", DROPOUT, "return word",
        "return (((word >> 1) ^ (1 << 29)).to(tl.int32) >= threshold, factor)", "gqa_short", "dropout",
    ),
    Fault(
        "dropout forgotten in o", "forward", FORWARD, "p",
        "pass", "gqa_short", "dropout",
    ),
    Fault(
        "dropout not made up for", "forward", FORWARD, "norm",
        "pass", "gqa_short", "dropout",
    ),
    Fault(
        "dropout forgotten in d_v", "key side", KEY, "rp",
        "rp = p", "gqa_short", "dropout",
    ),
    Fault(
        "dropout forgotten in dS", "both sides", TILE, "b",
        "pass", "gqa_short", "dropout",
    ),
    Fault(
        "dropout forgotten in tiled", "tiled", TILED, "p.mul_",
        "pass", "gqa_short", "dropout",
    ),
    # Finite masks that swallow the scores
    Fault(
        "lse of an additive mask collapsed", "forward", FORWARD, "tl.store (2)",
        "tl.store(lse + statistic * 2, m - tl.log2(norm) * 0.6931471805599453, mask=rows < M)\n"
        "tl.store(lse + statistic * 2 + 1, m * 0.0, mask=rows < M)",
        "gqa_short", "finite-masks",
    ),
    Fault(
        "lse of an additive mask collapsed in tiled", "tiled", TILED, "lse",
        "lse = torch.cat((m + l.log(), torch.zeros_like(l)), -1) if is_additive(grid.mask) else m + l.log()",
        "gqa_short", "finite-masks",
    ),
    Fault(
        "lse of an additive mask collapsed in reference", "reference", "backends/reference.py", "return P masked_fill",
        "return P.masked_fill(m.isneginf()[..., None], 0.0), torch.stack((m + log_l, 0 * log_l), dim=-1)",
        "gqa_short", "finite-masks",
    ),
    Fault(
        "S - lse of a sum of the pair", "both sides", TILE, "s (1)",
        "s = (s - (tl.maximum(m, LEAST) + log_l)[:, None] + log_l[:, None]) * 1.4426950408889634",
        "gqa_short", "finite-masks",
    ),
    Fault(
        "bias in base 2", "tiles", TILES, "s (1)",
        "s = (s * scale * 1.4426950408889634 + bias.to(tl.float32) * 1.4426950408889634) / 1.4426950408889634",
        "gqa_short", "finite-masks",
    ),
    # Precision
    Fault(
        "no float32 copies of half tensors", "wiring", "backends/high.py", "results",
        "results = function(*operands, *rest)", "gqa_short", "high",
    ),
    Fault(
        "a precision forgotten", "wiring", "serving.py", "name",
        "pass", "gqa_short", "high",
    ),
    # Other threads and compiled functions
    Fault(
        "what one thread does taken for all", "wiring", "_torch/eager.py", "_THREAD",
        '_THREAD = type("Shared", (), {})()', "gqa_short", "threads",
    ),
    Fault(
        "duals in a compiled function accepted", "wiring", AUTOGRAD, "if type operands",
        "if False:", "gqa_short", "compiled-duals",
    ),
    Fault(
        "a dual level in a compiled function overlooked", "wiring", TANGENTS,
        "return may_be_compiled may_hold_tangents",
        "return may_hold_tangents()", "gqa_short", "compiled-duals",
    ),
]  # fmt: skip

FAULTS = (
    *_OF_KERNELS, *OF_PIPELINES, *OF_WIDE, *OF_SCALING, *OF_HIGH, *OF_REPLAY, *OF_TILED, *_OF_WIRING, *_OF_SITUATIONS,
    *OF_SEVERAL_PROCESSES, *OF_PACKED_SEQUENCES, *OF_PARTIAL, *OF_BIAS,
)  # fmt: skip
