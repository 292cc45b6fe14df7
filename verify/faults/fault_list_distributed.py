"""The planted bugs of attention over several processes; threads stand for processes (checks/distributed.py)."""

from .fault import Fault, Stage

MERGE, RING, EXCHANGE = "distributed/merge.py", "distributed/ring.py", "distributed/exchange.py"
POSITIONS, HEADS, GATHER = "distributed/positions.py", "distributed/heads.py", "distributed/gather.py"
STAGE: Stage = "several processes"
CHECK = "divided"

OF_SEVERAL_PROCESSES = [
    Fault("mu not merged", STAGE, MERGE, "sum_mu", "pass", "divided", CHECK),
    Fault("o_t merged without the change of shift", STAGE, MERGE, "sum_o_t", "pass", "divided", CHECK),
    Fault("lse of the first shard kept", STAGE, MERGE, "lse", "pass", "divided", CHECK),
    Fault("log(l) of an additive mask not merged", STAGE, MERGE, "log_l", "pass", "divided_bias", CHECK),
    Fault(
        "gradients of the first block alone", STAGE, MERGE, "total narrow",
        "total.narrow(-2, part.start, length).copy_(grad)", "divided", CHECK,
    ),
    Fault(
        "gradients of keys sent one rank off", STAGE, RING, "started",
        "started = self._group.shift(sent, received, by=owner - self._group.rank + 1)", "divided", CHECK,
    ),
    Fault(
        "shards taken for those of the next rank", STAGE, RING, "source",
        "source = (group.rank + step) % group.size", "divided_causal", CHECK,
    ),
    Fault(
        "columns of a mask of the wrong shard", STAGE, RING, "columns",
        "columns = [mask[..., span.start : span.stop] for span in self._keys[self._group.rank]]", "divided_mask", CHECK,
    ),
    Fault(
        "the diagonal of a block left out", STAGE, POSITIONS, "rest", "rest = slice(0, 0)", "divided_causal", CHECK,
    ),
    Fault(
        "keys seen by earlier queries", STAGE, POSITIONS, "seen_by",
        "seen_by = slice(first_row, first_row + len(rows))", "divided_causal", CHECK,
    ),
    Fault(
        "gradient of a shared key head of the last rank alone", STAGE, EXCHANGE, "_part",
        "_part(total, -3, heads).copy_(part)", "divided", CHECK,
    ),
    Fault(
        "key heads of a piece shifted", STAGE, HEADS, "piece",
        "piece = Piece(_at(sharing, heads), _at(range(needed.start, needed.start + 1), needed))", "divided", CHECK,
    ),
    Fault(
        "rows put together in the order of ranks", STAGE, GATHER, "whole",
        "whole[rows.start : rows.stop] = part[rows.start : rows.stop]", "divided", CHECK,
    ),
]  # fmt: skip
