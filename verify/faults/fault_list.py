"""The planted bugs, but for those of what runs on GPUs alone (fault_list_gpu.py)."""

from .fault import Fault
from .fault_list_gpu import OF_PIPELINES, OF_REPLAY, OF_RESCALED
from .fault_list_tiled import OF_TILED, TILED

FORWARD, ROWSUMS = "kernels/portable/forward.py", "kernels/portable/backward_preprocess.py"
QUERY, KEY, TILE = (
    "kernels/portable/backward_query.py",
    "kernels/portable/backward_key.py",
    "kernels/portable/backward_tile.py",
)
TILES, KERNELS = "kernels/tiles.py", "backends/triton.py"

_OF_KERNELS = [
    # Forward and JVP
    Fault("alpha dropped from l", "forward", FORWARD, "l = l * alpha + ", "l = l + ", "lengths_33_257", "permutation"),
    Fault("alpha not applied to acc_o", "forward", FORWARD, "scale_rows(acc_o, alpha)", "acc_o", "lengths_33_257"),
    Fault("lse in the wrong base", "forward", FORWARD, "(norm)) * 0.6931471805599453", "(norm))", check="merge"),
    Fault("lse without the maximum", "forward", FORWARD, "(m - tl.log2(norm))", "(-tl.log2(norm))"),
    Fault("pair without the maximum", "forward", FORWARD, "statistic * 2, m,", "statistic * 2, m * 0,", check="shift"),
    Fault(
        "guard of empty rows dropped", "forward", FORWARD,
        'tl.where(m_new == float("-inf"), 0.0, m_new)', "m_new", "mask_bool_empty_rows",
    ),
    Fault(
        "last key tile dropped", "forward", FORWARD,
        "    end = N\n", "    end = (N // BLOCK_N) * BLOCK_N\n", "lengths_33_257",
    ),
    Fault(
        "GQA head mapped wrongly", "forward", FORWARD,
        "k_head = select_head(k, batch, head // group,", "k_head = select_head(k, batch, head % (heads // group),",
        "mask_gqa_per_head",
    ),
    Fault("running mean not moved", "jvp", FORWARD, "mean += step", "mean += step * 0.0", "lengths_33_257"),
    Fault(
        "alpha not applied to acc_o_t", "jvp", FORWARD,
        "acc_o_t = scale_rows(acc_o_t, alpha)", "acc_o_t = acc_o_t", "lengths_33_257",
    ),
    Fault(
        "acc_o_t centred on a stale mean", "jvp", FORWARD,
        "add_scaled_rows(acc_o_t, acc_o, -step * alpha)", "acc_o_t", "lengths_33_257",
    ),
    Fault(
        "mean of absolute values", "jvp", FORWARD,
        "tl.sum(p * s_t, 1)", "tl.sum(p * tl.abs(s_t), 1)", check="linear",
    ),
    Fault("mu not subtracted", "jvp", FORWARD, "(s_t - step[:, None])", "s_t"),
    Fault(
        "scale missing from the score tangent", "jvp", FORWARD,
        " * scale - mean[:, None]", " - mean[:, None]",
    ),
    Fault("tangent of v ignored", "jvp", FORWARD, "if len(v_t) > 0:", "if len(v_t) > 2:"),
    Fault(
        "missing tangent taken for the primal", "jvp", FORWARD,
        "call.operands(*inputs)",
        "call.operands(*inputs._replace(k_t=inputs.k if inputs.k_t is None else inputs.k_t))",
        "tangents_q",
    ),
    Fault(
        "tangents read with the strides of their primals", "jvp", FORWARD,
        "args = (*call.operands(*inputs),",
        "x = call.operands(*inputs)\n"
        "    x = (*x[:3], *(t and t._replace(raw=(t.raw[0], p.raw[1])) for p, t in zip(x[:3], x[3:])))\n"
        "    args = (*x,",
        "layout_expanded",
    ),
    # Row sums
    Fault("delta without T * O_t", "row sums", ROWSUMS, "delta += row_dot(T, o_t_rows)", "pass"),
    Fault("delta without G * O", "row sums", ROWSUMS, "delta += row_dot(G, o_rows)", "pass"),
    Fault(
        "only the first chunk of columns summed", "row sums", ROWSUMS,
        "tl.static_range(1, len(x))", "tl.static_range(len(x), len(x))", "dims_72_72",
    ),
    # What both backward kernels share
    Fault("mu dropped", "both sides", TILE, " - _statistic(mu, KEYS_FIRST))", ")"),
    Fault("row_a dropped", "both sides", TILE, "centred -= _statistic(row_a, KEYS_FIRST)", "pass"),
    Fault(
        "row_delta dropped", "both sides", TILE,
        "b - _statistic(row_delta", "b - 0.0 * _statistic(row_delta", check="adjoint",
    ),
    Fault("sign of row_delta", "both sides", TILE, "b - _statistic(row_delta", "b + _statistic(row_delta"),
    Fault("dS without P_t (A - a)", "both sides", TILE, "ds += p[1] * centred", "pass"),
    Fault(
        "tangent of v ignored in the backward", "both sides", TILE,
        "tl.constexpr = len(T) * len(v_t)", "tl.constexpr = 0",
    ),
    Fault(
        "tangent of q ignored in the backward", "both sides", TILE,
        "tl.constexpr = len(q_t) * len(k)", "tl.constexpr = 0",
    ),
    Fault(
        "mask ignored in the backward alone", "both sides", TILE,
        "biased_scores(s, scale, mask,", "biased_scores(s, scale, (),", "mask_bool_full",
    ),
    Fault(
        "stale statistic: row_a of the previous row", "key side", KEY,
        "(row_a, first, row, inside)", "(row_a, first, tl.maximum(row - 1, 0), inside)",
    ),
    Fault(
        "lse of an empty row left at -inf", "both sides", TILE,
        'tl.where(lse2 == float("-inf"), 0.0, lse2)', "lse2", "mask_bool_empty_rows",
    ),
    # Query-side backward
    Fault("G and T swapped", "query side", QUERY, "(q_rows, q_t_rows, G, T)", "(q_rows, q_t_rows, T, G)"),
    Fault(
        "d_q without dS_t k_t", "query side", QUERY,
        "add_product(acc_q, ds[1], k_t, PRECISION)", "acc_q", check="differences",
    ),
    Fault("scale squared", "query side", QUERY, "tl.float32) + scale", "tl.float32) + scale * scale"),
    Fault(
        "diagonal tiles taken for full ones", "query side", QUERY,
        "tl.minimum(N, m0 + 1) // BLOCK_N", "tl.minimum(N, m0 + BLOCK_M) // BLOCK_N", "causal_64_64",
    ),
    Fault(
        "v of the wrong key head", "query side", QUERY,
        "select_head(v, batch, head // group,", "select_head(v, batch, head % (heads // group),",
        "mask_gqa_per_head", "slices",
    ),
    # Key-side backward
    Fault("d_v without P_t.T @ T", "key side", KEY, "add_product(acc_v, p[1], T, PRECISION)", "acc_v"),
    Fault(
        "d_k without dS_t.T @ q_t", "key side", KEY,
        "add_product(acc_k, ds[1], q_t, PRECISION)", "acc_k", check="agreement",
    ),
    Fault("scale missing from d_k_t", "key side", KEY, "scale_rows(acc_k_t, factor)", "acc_k_t"),
    Fault("group ends after its first head", "key side", KEY, "range(group)", "range(1)", "mask_gqa_per_head"),
    Fault(
        "statistics of the wrong head", "key side", KEY,
        "* heads + head) * M", "* heads + kv_head) * M", "mask_gqa_per_head",
    ),
    Fault(
        "mask of the wrong head", "key side", KEY,
        "select_head(mask, batch, head,", "select_head(mask, batch, kv_head,", "mask_gqa_per_head",
    ),
    Fault(
        "first query tile of the diagonal skipped", "key side", KEY,
        "first = (n0 // BLOCK_M) * BLOCK_M", "first = (n0 // BLOCK_M + 1) * BLOCK_M", "causal_64_64",
    ),
    # Addressing, masks and launches
    Fault(
        "edge of the keys unmasked", "tiles", TILES,
        "s = tl.where(column < N - n0, s,", "s = tl.where(column <= N - n0, s,", "lengths_1_31",
    ),
    Fault("causal off by one", "tiles", TILES, "column <= row + (m0", "column <= row + (1 + m0", "causal_64_64"),
    Fault(
        "additive mask in the wrong base", "tiles", TILES,
        "tl.exp2(x * 1.4426950408889634)", "tl.exp2(x)", "mask_additive_full",
    ),
    Fault(
        "aligned mask read at its first keys alone", "tiles", TILES,
        "stride + tl.cast(n0, tl.uint32), 16)", "stride, 16)", "mask_bool_aligned",
    ),
    Fault(
        "aligned mask without its row", "tiles", TILES,
        "tl.multiple_of(row.to(tl.uint32) * stride,", "tl.multiple_of(row.to(tl.uint32) * 0,", "mask_additive_aligned",
    ),
    Fault(
        "last keys of an aligned mask not read", "tiles", TILES,
        "(N - n0) // 16)", "(N - n0) // 32)", "mask_bool_aligned",
    ),
    Fault(
        "last chunk of columns dropped", "tiles", TILES,
        "(len(a)):\n        s = ", "(1):\n        s = ", "dims_72_72",
    ),
    Fault(
        "last row of a partial tile never written", "tiles", TILES,
        "keep = rows[:, None] < limit - first", "keep = rows[:, None] < limit - first - 1",
    ),
    Fault("stride of the wrong batch dim", "tiles", TILES, "x.strides[2 + i]", "x.strides[2]", "batch_many"),
    Fault(
        "strided columns read as contiguous", "launch", "kernels/launch/call.py",
        "if strides[-1] != 1 and x.shape[-1] != 1:", "if False:", "layout_column_major",
    ),
    Fault(
        "every tensor taken for contiguous", "launch", "kernels/launch/call.py",
        "_layout(strides, x.dtype)", '_layout(torch.empty(x.shape, device="meta").stride(), x.dtype)',
        "layout_sequence_major",
    ),
    Fault(
        "mask read at its first key alone", "launch", "kernels/launch/call.py",
        "(column, aligned, additive)", "(0, False, additive)", "mask_bool_full",
    ),
    Fault(
        "gradients of tangents left unwritten", "launch", KERNELS,
        "torch.zeros_like(empty_rows(x, x.shape[-1]))", "empty_rows(x, x.shape[-1])", "cotangent_o_tangents_qkv",
    ),
]  # fmt: skip

OPERATORS, AUTOGRAD = "dispatch/operators.py", "dispatch/autograd.py"
_OF_WIRING = [
    Fault(
        "tangents dropped silently", "wiring", AUTOGRAD,
        "if not (q_t is None and k_t is None and v_t is None):", "if False:", check="forward_ad",
    ),
    Fault(
        "tangent of v dropped", "wiring", AUTOGRAD,
        '_split("k", k), _split("v", v)', '_split("k", k), (_split("v", v)[0], None)', check="forward_ad",
    ),
    Fault(
        "tangent of o without a graph", "wiring", AUTOGRAD,
        "operands.plain, *options)\n    return _torch.make_dual(o, o_t)",
        "operands.plain, *options)\n    return _torch.make_dual(o, o_t.detach())",
        check="forward_ad",
    ),
    Fault(
        "d_k and d_v exchanged", "wiring", AUTOGRAD,
        "grads = ctx.gradients(BACKWARD, (d_o, *ctx.saved_tensors), tuple(wanted))",
        "d_q, d_v, d_k = ctx.gradients(BACKWARD, (d_o, *ctx.saved_tensors), tuple(wanted))\n"
        "        grads = (d_q, d_k, d_v)",
        "plain",
    ),
    Fault(
        "gradients of primals and tangents exchanged", "wiring", AUTOGRAD,
        "*grads, None\n\n\ndef _in_present", "*grads[3:], *grads[:3], None\n\n\ndef _in_present",
    ),
    Fault(
        "o of an earlier call saved", "wiring", AUTOGRAD,
        "ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o, o_t,",
        'earlier = vars(_ForwardJvp).get("earlier", o)\n'
        "        _ForwardJvp.earlier = o\n"
        "        ctx.save_for_backward(q, k, v, q_t, k_t, v_t, earlier, o_t,",
        check="stateless",
    ),
    Fault(
        "o of the tangent saved as o", "wiring", AUTOGRAD,
        "ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o, o_t,",
        "ctx.save_for_backward(q, k, v, q_t, k_t, v_t, o_t, o,",
    ),
    Fault(
        "gradients asked for one place off", "wiring", AUTOGRAD,
        "return (None,) * len(ctx.needs_input_grad)\n        _, _, *wanted, _ = ctx.needs_input_grad\n"
        "        grads = ctx.gradients(BACKWARD_JVP",
        "return (None,) * len(ctx.needs_input_grad)\n        _, *wanted, _, _ = ctx.needs_input_grad\n"
        "        grads = ctx.gradients(BACKWARD_JVP",
    ),
    Fault(
        "cotangent of o_t dropped", "wiring", AUTOGRAD,
        "BACKWARD_JVP, (d_o, d_o_t, *ctx", "BACKWARD_JVP, (d_o, None, *ctx",
    ),
    Fault(
        "recorded backward gives tangents first", "wiring", AUTOGRAD,
        "grads = _redispatch_in_node(operator, keyset, (*args, wanted), fwd_grad)",
        "grads = _redispatch_in_node(operator, keyset, (*args, wanted), fwd_grad)\n"
        "        grads = (*grads[3:], *grads[:3])",
        check="func.grad",
    ),
    Fault(
        "outer levels cannot record", "wiring", "_torch/levels.py",
        "with torch.enable_grad(), _torch.set", "with _torch.set", check="outer-level",
    ),
    Fault(
        "second backward silently zero", "wiring", AUTOGRAD,
        "raise second_order(ctx.operator.handle.name())",
        "return (None,) * len(ctx.needs_input_grad)", check="second-order",
    ),
    Fault(
        "JVP of a JVP silently zero", "wiring", AUTOGRAD,
        "raise second_order(FORWARD_JVP.handle.name())", "pass", check="second-order",
    ),
    Fault(
        "JVP of a backward silently zero", "wiring", AUTOGRAD,
        "raise second_order(operator.handle.name())", "pass", check="second-order",
    ),
    Fault(
        "backward inside a dual level silent", "wiring", AUTOGRAD,
        "if ctx.in_level is not None and _has_tangent((ctx.in_level,)):", "if False:", check="second-order",
    ),
    Fault(
        "func.jvp with the tangent of v dropped", "wiring", "dispatch/func_jvp.py",
        "tangents = [_tangent(x, level) for x in tensors]",
        "tangents = [*(_tangent(x, level) for x in tensors[:2]), None]", check="forward-mode",
    ),
    Fault(
        "func.jvp gives o as its own tangent", "wiring", "dispatch/func_jvp.py",
        "make_dual(o, o_t)", "make_dual(o, o)", check="func.jvp",
    ),
    Fault(
        "short way with the options of an earlier call", "repeated calls", "dispatch/fast_path.py",
        "return operator, options, enable_gqa, q.shape", "return operator, q.shape", check="repeated",
    ),
    Fault(
        "short way with the tensors of an earlier call", "repeated calls", OPERATORS,
        "function(*tensors, *rest, *wanted)", "function(*operands, *rest, *wanted)", "plain", "repeated",
    ),
    Fault(
        "short way with the default scale", "repeated calls", "dispatch/fast_path.py",
        "canonical, Options(*options))", "canonical, Options(*options)._replace(scale=None))", check="repeated",
    ),
    Fault(
        "short way back with the options of an earlier call", "repeated calls", "dispatch/fast_path.py",
        "gradients = derivatives.BoundGradients(options)",
        'gradients = vars(derivatives).setdefault("first", derivatives.BoundGradients(options))', check="repeated",
    ),
    Fault("vmap over the wrong dim", "wiring", OPERATORS, "x.movedim(dim, 0)", "x", "square", "func.vmap"),
    Fault(
        "default scale from the width of v", "wiring", OPERATORS,
        "options.of_backend(operands.q)", "options.of_backend(operands.v)", "dims_64_24",
    ),
    Fault(
        "causal option lost", "wiring", "api.py",
        "attention_jvp(operands, Options(is_causal,", "attention_jvp(operands, Options(False,",
        "causal_64_64",
    ),
]  # fmt: skip

_OF_SITUATIONS = [
    # Cotangents or tangents that are mapped alone
    Fault(
        "expanded statistics read as contiguous", "launch", "kernels/launch/call.py",
        "    x = x.contiguous()\n    address = x.data_ptr()", "    address = x.data_ptr()",
        "causal_33_80", "func.vjp-mapped",
    ),
    Fault(
        "expanded statistics of an additive mask read as contiguous", "launch", "kernels/launch/call.py",
        "    x = x.contiguous()\n    address = x.data_ptr()", "    address = x.data_ptr()",
        "gqa_short", "vectorized",
    ),
    Fault(
        "mapped tangents silently zero", "wiring", AUTOGRAD,
        "o, lse = FORWARD.handle(*operands.plain, *options)",
        "o, lse = FORWARD.handle(*operands.plain, *options)\n        o_t = torch.zeros_like(o_t)",
        "gqa_short", "vectorized",
    ),
    # Masks that are no plain numbers
    Fault(
        "lower right taken for upper left", "wiring", "causal_bias.py",
        "bias.variant == CausalVariant.UPPER_LEFT or rows == columns", "True", "gqa_short", "causal-bias",
    ),
    Fault(
        "lower right off by one", "wiring", "causal_bias.py",
        ".tril(columns - rows)", ".tril(columns - rows + 1)", "gqa_short", "causal-bias",
    ),
    Fault(
        "gradient of a mask silently zero", "wiring", AUTOGRAD,
        "if mask is None or not mask.is_floating_point():", "if True:", "gqa_short", "mask-gradient",
    ),
    Fault(
        "tangent of a mask dropped", "wiring", AUTOGRAD,
        "if _may_be_dual() and _has_tangent((mask,)):", "if False:", "gqa_short", "mask-gradient",
    ),
    # Finite masks that swallow the scores
    Fault(
        "lse of an additive mask collapsed", "forward", FORWARD,
        "lse + statistic * 2, m, mask=rows < M)\n"
        "        tl.store(lse + statistic * 2 + 1, -tl.log2(norm) * 0.6931471805599453,",
        "lse + statistic * 2, m - tl.log2(norm) * 0.6931471805599453, mask=rows < M)\n"
        "        tl.store(lse + statistic * 2 + 1, m * 0.0,",
        "gqa_short", "finite-masks",
    ),
    Fault(
        "lse of an additive mask collapsed in tiled", "tiled", TILED,
        "torch.cat((m, l.log()), -1)", "torch.cat((m + l.log(), torch.zeros_like(l)), -1)", "gqa_short", "finite-masks",
    ),
    Fault(
        "lse of an additive mask collapsed in reference", "reference", "backends/reference.py",
        "torch.stack((m, log_l), dim=-1)", "torch.stack((m + log_l, 0 * log_l), dim=-1)", "gqa_short", "finite-masks",
    ),
    Fault(
        "S - lse of a sum of the pair", "both sides", TILE,
        "s = (s - tl.maximum(lse[0], LEAST)[:, None]) * 1.4426950408889634\n"
        "        return s - (lse[1] * 1.4426950408889634)[:, None]",
        "return (s - (tl.maximum(lse[0], LEAST) + lse[1])[:, None]) * 1.4426950408889634", "gqa_short", "finite-masks",
    ),
    Fault(
        "bias in base 2", "tiles", TILES,
        "s * scale + bias.to(tl.float32)",
        "(s * scale * 1.4426950408889634 + bias.to(tl.float32) * 1.4426950408889634) / 1.4426950408889634",
        "gqa_short", "finite-masks",
    ),
    # Other threads and compiled functions
    Fault(
        "what one thread does taken for all", "wiring", "_torch/eager.py",
        "threading.local()", 'type("Shared", (), {})()', "gqa_short", "threads",
    ),
    Fault(
        "duals in a compiled function accepted", "wiring", AUTOGRAD,
        'if type(operands.q) is Tensor and _torch.dual_level_active() and not is_marked("public"):', "if False:",
        "gqa_short", "compiled-duals",
    ),
    Fault(
        "a dual level in a compiled function overlooked", "wiring", AUTOGRAD,
        'return _may_be_compiled() or may_hold_tangents()', "return may_hold_tangents()", "gqa_short", "compiled-duals",
    ),
]  # fmt: skip

FAULTS = (*_OF_KERNELS, *OF_PIPELINES, *OF_RESCALED, *OF_REPLAY, *OF_TILED, *_OF_WIRING, *_OF_SITUATIONS)
