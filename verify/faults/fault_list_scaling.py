"""The planted bugs of per-tensor scaling and of precision="high" on warp-specialised kernels."""

from .fault import Fault

HOPPER = "kernels/hopper/"
SCALING, RESULTS, KEY = HOPPER + "per_tensor_scaling.py", HOPPER + "results.py", HOPPER + "backward_key.py"
PREPROCESS, POSTPROCESS = HOPPER + "backward_preprocess.py", HOPPER + "backward_postprocess.py"
LAUNCH = HOPPER + "launch.py"


def _scaled(
    name: str, file: str, marker: str, statement: str, case: str = "hopper_64", check: str = "per-tensor-scaling"
) -> Fault:
    return Fault(f"per-tensor scaling: {name}", "pipelines", file, marker, statement, case, check)


def _high(name: str, file: str, marker: str, statement: str, case: str = "hopper_64") -> Fault:
    return Fault(f"high precision: {name}", "pipelines", file, marker, statement, case, "high-scaling")


OF_SCALING = [
    _scaled(
        "softmax scale of the unscaled tensors", SCALING, "softmax_scale",
        "softmax_scale = tl.maximum(scale * _power(0 * u_q), 1e-30)",
    ),
    _scaled("o_t with the scale of o", SCALING, "tl.store (1)", "tl.store(tensor_scales + O_T, _power(u_v))"),
    _scaled("mu saved scaled", SCALING, "tl.store (2)", "tl.store(tensor_scales + MU, _power(0 * r))"),
    _scaled("d_v with the exponent of P", SCALING, "tl.store (3)", "tl.store(tensor_scales + D_V, _power(u_do))"),
    _scaled(
        "d_q_t with the scale of d_q", SCALING, "tl.store (4)",
        "tl.store(tensor_scales + D_Q_T, _power(u_do + u_v - u_q - P_EXPONENT))",
    ),
    _scaled(
        "k_t with a scale of its own", SCALING, "tl.store (6)",
        "tl.store(tensor_scales + KEY_SIDE + 2, _power(-u_k - r - 1))",
    ),
    _scaled(
        "v with the scale of k", SCALING, "tl.store (5)",
        "tl.store(tensor_scales + KEY_SIDE + 1, _power(-u_k))",
    ),
    _scaled("two scales in one place", HOPPER + "scales.py", "D_V_T", "D_V_T = tl.constexpr(8)"),
    _scaled("delta unscaled", PREPROCESS, "delta (1)", "pass"),
    _scaled("a unscaled", PREPROCESS, "row_a", "pass"),
    _scaled("exponent of P left out", PREPROCESS, "lse_rows (2)", "pass"),
    _scaled(
        "dq_accum of d_q_t with the scale of d_q", POSTPROCESS, "factor_t",
        "factor_t = tl.full([ROWS], softmax_scale * tl.load(tensor_scales + D_Q), tl.float32)", "hopper_128",
    ),
    _scaled(
        "scale of another tensor", RESULTS, "scale",
        "scale = gl.load(tensor_scales[0] + (FIRST + i * STEP))", "hopper_72",
    ),
    _scaled(
        "half of the columns written twice", RESULTS, "_store_rows",
        "_store_rows(out, gl.convert_layout(right, accumulator(COLUMNS)), [batch, head, row, column], tile)",
        "hopper_72",
    ),
    _scaled(
        "d_k_t with the scale of d_v", KEY, "store_results",
        "store_results(program, grads, consumer, CHUNKS, D_K, 1)",
        "hopper_72", "per-tensor-scaling-in-order",
    ),
]  # fmt: skip

OF_HIGH = [
    _high(
        "scale missing from gradients", RESULTS, "_store_rows (2)",
        "_store_rows(outs[i], values[i], coordinates, tile)",
    ),
    _high("O rounded to the type of q", LAUNCH, "kind", "kind = like.dtype"),
    _high(
        "v_t and d_o lose digits beside a large S_t", SCALING, "is_half", "is_half = False", "hopper_64_large_mu",
    ),
]  # fmt: skip
