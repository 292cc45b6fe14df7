"""The planted bugs of the backward in one pass."""

from .fault import Fault

KERNEL, TILES = "kernels/hopper/backward_one_pass.py", "kernels/hopper/one_pass_tiles.py"
EXCHANGE = "kernels/hopper/one_pass_exchange.py"


def _one_pass(
    name: str, file: str, marker: str, statement: str, case: str = "hopper_128", check: str = "emulated-dq-accum"
) -> Fault:
    return Fault(f"one pass: {name}", "pipelines", file, marker, statement, case, check)


OF_ONE_PASS = [
    _one_pass("scale missing from S_t", TILES, "z", "z = s_t - mu", check="emulated"),
    _one_pass(
        "gradient with T v.T for T v_t.T", TILES, "return s",
        "return s, add_scores(s_t, x, _two_of(streamed, which)[0], WHOLE=len(streamed) == 4)", check="emulated",
    ),
    _one_pass("delta dropped", TILES, "b", "pass", check="emulated"),
    _one_pass(
        "d_k from q for q_t", TILES, "acc_k", "acc_k = add_product(acc_k, weights_t, q, WHOLE)", check="emulated",
    ),
    _one_pass(
        "scale missing from d_k", KERNEL, "store_results", "store_results(program, accs, 0, CHUNKS, 0, 0)",
        check="emulated",
    ),
    _one_pass("d_q without dS_t k_t", TILES, "totals", "pass"),
    _one_pass("dq_accum of the first tile of queries for all", KERNEL, "dq_tile", "pass"),
    _one_pass(
        "tiles of dq_accum half over one another", TILES, "first",
        "first = tile.to(gl.int64) * (CONSUMER_ROWS * COLUMNS // 2)",
    ),
    _one_pass("P stored over dS that is still read", EXCHANGE, "mbarrier.wait (1)", "pass", "hopper_128_many_tiles"),
    _one_pass("P read before it is stored", EXCHANGE, "mbarrier.wait (2)", "pass", check="emulated"),
    _one_pass("dS read before it is stored", EXCHANGE, "mbarrier.wait (3)", "pass"),
    _one_pass(
        "last keys without a program", "kernels/hopper/launch.py", "programs",
        "programs = self.given.call.key_programs(BLOCK_ROWS)", check="emulated",
    ),
    _one_pass("dS and dS_t exchanged", EXCHANGE, "store", "exchange.tiles.index(DS_T).store(ds)"),
]  # fmt: skip
