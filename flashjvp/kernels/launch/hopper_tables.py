"""The tile table of the warp-specialised kernels in hopper/, by architecture, padded head dim (80 = 64 + 16 serves 72,
too; D and Dv are padded to that of the larger one, but see NARROW_VALUES), with or without tangents, and family.

Where there is a `backward_value`, `backward_key` leaves d_v and d_v_t to it. `backward_dq_accum` is the kernel of
`backward_key` where it also accumulates d_q and d_q_t in global memory; `backward_pairs` can do so, too. Both then
replace `backward_query`: from DQ_ACCUM_FROM rows of queries on, and not in PyTorch's deterministic mode. Otherwise
`backward_pairs` replaces `backward_key` alone. `backward_one_pass` does so, too, and replaces `backward_value`, for
calls of half types without a mask. It adds up d_q and d_q_t below ONE_PASS_DQ_ACCUM_BELOW rows of queries instead. At
the head dims ONE_PASS_UNLESS_SUMMED it serves calls alone of which nothing is added up.

Above 128 the table has calls with tangents alone, which the wide kernels serve: 64 rows a program (wide_pipeline.py).

The kernels were verified and timed on a GPU with the releases MEASURED of Triton, those of head dims above 128 with
MEASURED_WIDE; with another one they must pass selfcheck.py. Additive and block masks take them with MEASURED_MASKS
alone, masks at head dims above 128 with MEASURED_WIDE_MASKS, windows and packed sequences with MEASURED_BANDS.
Persistent kernels need MEASURED_PERSISTENT, the backward in one pass MEASURED_ONE_PASS, pairs of queries MEASURED_PAIRS
and narrow values MEASURED_NARROW_VALUES. What is new begins with the releases that it ran with. From
REGISTER_OPERANDS_SINCE on, fewer tiles stay in registers: the ptxas of that release copies them for each product.
"""

from typing import NamedTuple


class Pipeline(NamedTuple):
    """The tile sizes of one warp-specialised kernel."""

    block_rows: int  # rows of a streamed tile
    stages: int  # pipeline stages: streamed tiles in shared memory at once
    register_operands: int = 0  # how many resident tiles, the first ones, products read from registers
    sub_tiles: int = 1  # a tile is computed in so many pieces, one after the other: scores take fewer registers
    buffer_stages: int = 0  # tiles whose dS and dS_t wait in shared memory to be added to d_q and d_q_t


class Persistent(NamedTuple):
    """Where and how the persistent kernel of a family serves (hopper/persistent.py)."""

    up_to: int  # rows that an item of work streams: keys, or queries of all heads of a group
    pipeline: Pipeline
    resident_buffers: int  # resident tiles of each tensor for a consumer; with 2, the next ones load meanwhile
    halves: bool = False  # whether programs share blocks of 128 rows


Families = dict[str, Pipeline]
# padded head dim -> rows of queries from which on accumulating d_q and d_q_t was measured to be 10 % faster
DQ_ACCUM_FROM = {80: 1024, 96: 2048, 128: 2048}
# The same of `backward_one_pass`: before which it was. From there on `backward_query` beside it is as fast or faster.
ONE_PASS_DQ_ACCUM_BELOW = {96: 1, 128: 2048}
ONE_PASS_UNLESS_SUMMED = (80,)  # faster than the other kernels without sums, slower than those with them
Release = tuple[int, int]
MEASURED: tuple[Release, ...] = ((3, 6), (3, 7), (3, 8), (3, 9))
MEASURED_WIDE: tuple[Release, ...] = MEASURED
MEASURED_PERSISTENT: tuple[Release, ...] = MEASURED
# by padded head dim: of dense calls, for windows and packed sequences have MEASURED_BANDS
MEASURED_ONE_PASS: dict[int, tuple[Release, ...]] = {80: ((3, 6),), 96: MEASURED, 128: ((3, 6), (3, 7), (3, 8))}
# likewise: of all calls with tangents (hopper/backward_key_pairs.py), without a register operand
MEASURED_PAIRS: dict[int, tuple[Release, ...]] = {64: ((3, 6), (3, 9))}
# padded head dim -> columns to which the forward pass pads v and o if they have no more, in calls of half types
NARROW_VALUES = {128: 64}
MEASURED_NARROW_VALUES: tuple[Release, ...] = ((3, 6),)
MEASURED_MASKS: tuple[Release, ...] = MEASURED
MEASURED_WIDE_MASKS: tuple[Release, ...] = ((3, 6),)
MEASURED_BANDS: tuple[Release, ...] = MEASURED
REGISTER_OPERANDS_SINCE: Release = (3, 9)
# from then on: (padded head dim, "tangents" or "plain", family) -> resident tiles in registers
REGISTER_OPERANDS = {
    (64, "plain", "backward_query"): 1,
    (80, "tangents", "forward"): 0,
    (80, "tangents", "backward_key"): 1,
    (96, "tangents", "backward_key"): 0,
    (96, "tangents", "backward_dq_accum"): 0,
    (96, "tangents", "backward_query"): 0,
}

EVERY = 1 << 30  # however many rows
# (padded head dim, family) -> its persistent kernels on sm_90, for calls with tangents: the first of so many rows
PERSISTENT: dict[tuple[int, str], tuple[Persistent, ...]] = {
    (64, "forward"): (Persistent(EVERY, Pipeline(128, 2), 2),),
    (64, "backward_key"): (Persistent(EVERY, Pipeline(32, 4, register_operands=1), 2),),
    (64, "backward_query"): (Persistent(EVERY, Pipeline(64, 3, register_operands=1), 2, halves=True),),
    (128, "forward"): (Persistent(1024, Pipeline(64, 2), 1, halves=True),),
}

# architecture -> padded head dim -> "tangents" or "plain" -> family -> tile
PIPELINES: dict[str, dict[int, dict[str, Families]]] = {
    "sm_90": {
        64: {
            "tangents": {
                "forward": Pipeline(128, 3),
                "backward_key": Pipeline(32, 4, register_operands=1),
                "backward_query": Pipeline(64, 3, register_operands=1),
            },
            "plain": {
                "forward": Pipeline(128, 3),
                "backward_key": Pipeline(64, 4),
                "backward_query": Pipeline(128, 3, register_operands=2),
            },
        },
        80: {
            "tangents": {
                "forward": Pipeline(64, 4, register_operands=1),
                "backward_key": Pipeline(64, 3, register_operands=3, sub_tiles=2),
                "backward_one_pass": Pipeline(64, 3),
                "backward_dq_accum": Pipeline(64, 2, register_operands=2, sub_tiles=2, buffer_stages=2),
                "backward_value": Pipeline(64, 3),
                "backward_query": Pipeline(32, 4, register_operands=2),
            },
            "plain": {
                "forward": Pipeline(128, 3),
                "backward_key": Pipeline(64, 4),
                "backward_query": Pipeline(64, 4),
            },
        },
        96: {
            "tangents": {
                "forward": Pipeline(64, 3),
                "backward_key": Pipeline(32, 3, register_operands=2),
                "backward_one_pass": Pipeline(64, 2),
                "backward_dq_accum": Pipeline(64, 2, register_operands=1, sub_tiles=2, buffer_stages=1),
                "backward_value": Pipeline(64, 3),
                "backward_query": Pipeline(32, 4, register_operands=2),
            },
            "plain": {
                "forward": Pipeline(128, 3),
                "backward_key": Pipeline(64, 4),
                "backward_query": Pipeline(64, 4),
            },
        },
        128: {
            "tangents": {
                "forward": Pipeline(64, 2),
                "backward_one_pass": Pipeline(64, 2),
                "backward_pairs": Pipeline(32, 2),
                "backward_value": Pipeline(64, 2),
                "backward_query": Pipeline(32, 3),
            },
            "plain": {
                "forward": Pipeline(128, 2),
                "backward_key": Pipeline(64, 3),
                "backward_query": Pipeline(64, 3),
            },
        },
        160: {
            "tangents": {
                "forward": Pipeline(32, 3),
                "backward_key": Pipeline(64, 1),
                "backward_value": Pipeline(64, 2),
                "backward_query": Pipeline(64, 1),
            },
        },
        192: {
            "tangents": {
                "forward": Pipeline(64, 1),
                "backward_key": Pipeline(64, 1),
                "backward_value": Pipeline(64, 1),
                "backward_query": Pipeline(64, 1),
            },
        },
        256: {
            "tangents": {
                "forward": Pipeline(64, 1),
                "backward_key": Pipeline(32, 1),
                "backward_value": Pipeline(64, 1),
                "backward_query": Pipeline(32, 1),
            },
        },
    },
}
