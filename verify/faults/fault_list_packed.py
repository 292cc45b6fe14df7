"""The planted bugs of packed sequences (checks/packed.py)."""

from .fault import Fault, Stage

VARLEN = "kernels/portable/varlen.py"
STAGE: Stage = "packed sequences"

OF_PACKED_SEQUENCES = [
    Fault(
        "tile of the sequence before", STAGE, VARLEN, "before",
        "before += tl.sum(((starts < tile) & (b < count)).to(tl.int32))", check="packed",
    ),
    Fault("rows of the first sequence", STAGE, "kernels/portable/rows.py", "ptr", "ptr = rows[0]", check="packed"),
    Fault("keys of the next sequence seen", STAGE, VARLEN, "end", "end = total", check="packed"),
    Fault("first query aligned with first key", STAGE, VARLEN, "shift", "shift = 0", "causal_33_80", "packed"),
    Fault(
        "gradients of keys from queries of the first sequence", STAGE, VARLEN, "start_q, queries",
        "start_q, queries = _rows_of(cu, 0, M)", check="packed",
    ),
    Fault(
        "packed: delta in the place of a", STAGE, "backends/triton_varlen.py", "statistics",
        "statistics = (lse, None if d_o_t is None else mu, row_delta, row_a)", check="packed",
    ),
    Fault(
        "one after the other: first query aligned with first key", STAGE, "backends/varlen.py", "mask",
        "mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril()", "causal_33_80", "packed",
    ),
]  # fmt: skip
