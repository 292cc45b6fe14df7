"""The tile table of the warp-specialised kernels in hopper/, by architecture, padded head dim (80 = 64 + 16 serves 72,
too; D and Dv are padded to that of the larger one), with or without tangents, and family.

Where there is a `backward_value`, `backward_key` leaves d_v and d_v_t to it. `backward_dq_accum` is the kernel of
`backward_key` where it also accumulates d_q and d_q_t in global memory; `backward_pairs` can do so, too. Both then
replace `backward_query`: from DQ_ACCUM_FROM rows of queries on, and not in PyTorch's deterministic mode. Otherwise
`backward_pairs` replaces `backward_key` alone.

Above 128 the table has calls with tangents alone, which the wide kernels serve: 64 rows a program (wide_pipeline.py).

The kernels were verified and timed on a GPU with the releases MEASURED of Triton, those of head dims above 128 with
MEASURED_WIDE; with another one they must pass selfcheck.py. Additive and block masks, windows and packed sequences take
them with MEASURED_MASKS alone. From REGISTER_OPERANDS_SINCE on, fewer tiles stay in registers: the ptxas of that
release copies them for each product.
"""

from typing import NamedTuple


class Pipeline(NamedTuple):
    """The tile sizes of one warp-specialised kernel."""

    block_rows: int  # rows of a streamed tile
    stages: int  # pipeline stages: streamed tiles in shared memory at once
    register_operands: int = 0  # how many resident tiles, the first ones, products read from registers
    sub_tiles: int = 1  # a tile is computed in so many pieces, one after the other: scores take fewer registers
    buffer_stages: int = 0  # tiles whose dS and dS_t wait in shared memory to be added to d_q and d_q_t


Families = dict[str, Pipeline]
# padded head dim -> rows of queries from which on accumulating d_q and d_q_t was measured to be 10 % faster
DQ_ACCUM_FROM = {80: 1024, 96: 2048, 128: 2048}
Release = tuple[int, int]
MEASURED: tuple[Release, ...] = ((3, 6), (3, 7), (3, 8), (3, 9))
MEASURED_WIDE: tuple[Release, ...] = ((3, 6),)
MEASURED_MASKS: tuple[Release, ...] = ((3, 6),)
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
