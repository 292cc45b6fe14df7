"""The planted bugs that show in some calls alone: what is mapped, learned biases, dropout, precision, threads."""

from .fault import Fault
from .fault_list_tiled import TILED

FORWARD = "kernels/portable/forward.py"
KEY = "kernels/portable/backward_key.py"
TILE = "kernels/portable/backward_tile.py"
BIAS = "kernels/portable/backward_bias.py"
DROPOUT = "kernels/portable/dropout.py"
TILES = "kernels/tiles.py"
AUTOGRAD = "dispatch/autograd.py"
TANGENTS = "dispatch/tangents.py"

OF_SITUATIONS = [
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
