"""The planted bugs of additive masks on the warp-specialised kernels."""

from .fault import Fault

HOPPER = "kernels/hopper/"
BIAS, FORWARD, PREPROCESS = HOPPER + "bias.py", HOPPER + "forward.py", HOPPER + "backward_preprocess.py"
FINITE = "emulated-finite-masks"


def _additive(
    name: str, file: str, marker: str, statement: str, case: str = "hopper_additive", check: str = "emulated"
) -> Fault:
    return Fault(f"additive masks: {name}", "pipelines", file, marker, statement, case, check)


OF_BIAS = [
    _additive(
        "that of the first head for all", BIAS, "offset", "offset = batch.to(gl.int64) * ((batch_stride - 3) >> 1)",
    ),
    _additive("scaled like the products", BIAS, "return s bias", "return (s + bias.to(gl.float32)) * scale"),
    _additive("rows of the first query for all", BIAS, "offsets", "offsets = gl.minimum(query, 0) * row_stride"),
    _additive("transposed twice", BIAS, "key, query", "key, query = column, row"),
    _additive("a maximum in base 2 beside scores in nats", FORWARD, "scale2", "scale2 = program.scale * LOG2_E"),
    _additive("log(l) not stored", FORWARD, "gl.store (2)", "pass"),
    _additive(
        "log(l) of a head's first queries for all", BIAS, "log_l",
        "log_l = bias[2] + (number.to(gl.int64) * (gl.cdiv(M, 128) * 128) + tile * 0)", "hopper_additive_128",
    ),
    _additive("log(l) in the wrong base", PREPROCESS, "log_l_rows",
        "log_l_rows = tl.load(pair + 1, mask=rows < M, other=float('inf'))",
    ),
    _additive(
        "log(l) beside a large maximum", BIAS, "return gl exp2",
        "return gl.exp2(s * LOG2_E - (m * LOG2_E + log_l))", check=FINITE,
    ),
    _additive(
        "P of queries beyond the end", PREPROCESS, "log_l_rows",
        "log_l_rows = tl.load(pair + 1, mask=rows < M, other=0.0) * 1.4426950408889634", "hopper_additive_128", FINITE,
    ),
    _additive(
        "keys beyond the end have the bias 0", BIAS, "return gl load",
        "return gl.load(pointers, mask=exists, other=0.0), log_l", "hopper_additive_128", FINITE,
    ),
    _additive("a row without keys has an infinite maximum", PREPROCESS, "lse_rows (3)",
        "lse_rows = tl.load(pair, mask=rows < M, other=0.0)", "hopper_additive_empty_rows",
    ),
]  # fmt: skip
