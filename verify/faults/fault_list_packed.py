"""The planted bugs of packed sequences (checks/packed.py)."""

from .fault import Fault, Stage

VARLEN = "kernels/portable/varlen.py"
STAGE: Stage = "packed sequences"

HOPPER = "kernels/hopper/"


def _entry(name: str, file: str, marker: str, statement: str, case: str = "hopper_sequences") -> Fault:
    return Fault(f"packed: {name}", STAGE, file, marker, statement, case, "emulated-packed")


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
        "start_q, queries = rows_of(cu, 0, M)", check="packed",
    ),
    Fault(
        "packed: delta in the place of a", STAGE, "backends/triton_varlen.py", "statistics",
        "statistics = (lse, None if d_o_t is None else mu, row_delta, row_a)", check="packed",
    ),
    Fault(
        "statistics taken for those of other heads", STAGE, "backends/rows_first.py", "return x reshape",
        "return x.mT.reshape(*(batch or (1,)), heads, rows)", "gqa", "packed",
    ),
    _entry("as long as all of them", HOPPER + "band_place.py", "return ENTRIES",
        "return ENTRIES - total + end, total - end"),
    _entry("rows of the next one", HOPPER + "band_place.py", "end", "end = gl.maximum(total, start)"),
    _entry(
        "block of the one before", HOPPER + "band_place.py", "before",
        "before += gl.sum(((starts < block) & (b < count)).to(gl.int32), 0)",
    ),
    _entry(
        "first half of a block for both programs", HOPPER + "band_place.py", "row", "row += 0",
        "hopper_sequences_128",
    ),
    _entry("statistics of other rows", HOPPER + "band_place.py", "column", "column = gl.load(cu + sequence)"),
    _entry(
        "results of other rows", HOPPER + "band_place.py", "return pointer",
        "return pointer + (0 - block.batch.to(gl.int64) * heads * columns)",
    ),
    _entry(
        "statistics of a head's first tile", HOPPER + "band.py", "coordinates",
        "coordinates = [(band.number + head) * STATISTICS, band.column]",
    ),
    _entry(
        "row sums of the first sequence", HOPPER + "backward_preprocess.py", "source",
        "source = head.to(tl.int64) * M + rows",
    ),
    _entry(
        "first query aligned with first key for Hopper", "kernels/launch/call.py", "self.band",
        "self.band = (-OPEN, 0 if is_causal else OPEN)",
    ),
    Fault(
        "one after the other: first query aligned with first key", STAGE, "backends/varlen.py", "mask",
        "mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril()", "causal_33_80", "packed",
    ),
]  # fmt: skip
