"""The planted bugs of the warp-specialised kernels of head dims above 128."""

from .fault import Fault

WIDE = "kernels/hopper/wide_"


def _wide(name: str, file: str, marker: str, statement: str, case: str = "hopper_192") -> Fault:
    return Fault(f"wide kernels: {name}", "pipelines", WIDE + file, marker, statement, case, "emulated")


OF_WIDE = [
    _wide("mu not subtracted", "forward.py", "weights_t", "weights_t = (p * (s_t * program.scale)).to(v[0].dtype)"),
    _wide("o_t centred on a stale mean", "forward.py", "acc_o_t", "acc_o_t = complete(acc_o_t)", "hopper_256"),
    _wide("the mean over one tile", "forward.py", "store_row_number", "store_row_number(inputs, SUM, tile_sum)"),
    _wide(
        "mean of S_t not subtracted in d_v", "backward_value.py", "weights_t",
        "weights_t = (p * (s_t * program.scale)).to(q[0].dtype)",
    ),
    _wide("d_k without T v_t.T", "backward_key.py", "b", "pass"),
    _wide("d_q without T v_t.T", "backward_query.py", "b", "pass", "hopper_160"),
    _wide(
        "delta dropped", "gradients.py", "weights",
        "weights = (p * (load_numbers(inputs) * centred + b)).to(y[0].dtype)",
    ),
    _wide(
        "first chunk of d_q without dS_t k_t", "gradients.py", "acc",
        "acc = add_product((accs[0],), weights_t, y)", "hopper_256",
    ),
    _wide("read before the other consumer has stored it", "exchange.py", "mbarrier.wait", "pass"),
    _wide("tile freed before it is read", "pipeline.py", "mbarrier.wait", "mbarrier.wait(empty, phase)"),
    _wide(
        "statistics of the wrong head", "pipeline.py", "number (1)",
        "number = block.batch * loop.query_heads + loop.head", "hopper_192_gqa",
    ),
    _wide(
        "second column chunk written over the first", "pipeline.py", "coordinates",
        "coordinates = [block.batch, block.head, block.row0, 0]",
    ),
    _wide(
        "last keys without a program", "launch.py", "programs",
        "programs = max(1, call.key_programs(ROWS) - 1) if by_keys else call.query_programs(ROWS)",
    ),
    _wide("mask ignored in d_k", "backward_key.py", "p", "pass", "hopper_192_mask"),
    _wide("mask ignored in d_v", "backward_value.py", "p", "pass", "hopper_192_mask"),
    _wide("mask ignored in d_q", "backward_query.py", "p", "pass", "hopper_192_mask"),
    _wide(
        "words for tiles of queries in the place of those for keys", "launch.py", "mask", "mask = words.by_queries",
        "hopper_192_mask",
    ),
    _wide(
        "words of the tile after", "pipeline.py", "mask",
        "mask = load_mask_tile(packed_mask, block.row0, tile + 1, ROWS, True)", "hopper_192_mask",
    ),
    _wide(
        "step of the mean of a row without keys divided by 0", "forward.py", "negative_step",
        "negative_step = (mean * tile_sum - sum_of_products(p, s_t, 8, TILE) * program.scale) / l",
        "hopper_192_empty_rows",
    ),
    _wide(
        "log(l) of the wrong head", "pipeline.py", "number (2)", "number = block.batch * loop.query_heads + loop.head",
        "hopper_192_additive",
    ),
    _wide(
        "additive mask of the wrong head", "pipeline.py", "bias",
        "bias = bias_of_head(program.bias, block.batch, loop.head)", "hopper_192_additive",
    ),
    _wide("log(l) not stored", "forward.py", "gl.store", "pass", "hopper_192_additive"),
    _wide(
        "mu in the place of log(l)", "backward_query.py", "rows", "rows = rows + (rows[1],)", "hopper_192_additive",
    ),
]  # fmt: skip
