"""Tiles of the warp-specialised kernels in hopper/: by architecture, padded head dim (80 = 64 + 16 serves 72, too),
with or without tangents, and family.

Where there is a `backward_value`, `backward_key` leaves d_v and d_v_t to it. From SUMS_FROM rows of queries on, unless
PyTorch is in its deterministic mode, `backward_sums`, the same kernel as `backward_key`, and `backward_pairs` stand in
for `backward_query`, too; otherwise `backward_pairs` stands in for `backward_key`.

The kernels were verified and timed on a GPU with the releases MEASURED of Triton; with a newer one they must pass
hopper/selfcheck.py. From HELD_SINCE on fewer tiles are held: that release's ptxas copies them for each product.
"""

from typing import NamedTuple


class Pipeline(NamedTuple):
    """What a kernel streams, and what it holds."""

    rows: int  # of a streamed tile
    stages: int  # tiles of the ring
    held: int = 0  # own tiles in registers, the first ones: their products read less shared memory
    parts: int = 1  # in which a tile is computed, one after the other: fewer registers for scores
    slots: int = 0  # tiles whose dS and dS_t wait in shared memory for the sums of query gradients


Families = dict[str, Pipeline]
# padded head dim -> rows of queries from which on sums of query gradients were measured to be 10 % faster
SUMS_FROM = {80: 1024, 96: 2048, 128: 2048}
Release = tuple[int, int]
MEASURED: tuple[Release, ...] = ((3, 6), (3, 7), (3, 8), (3, 9))
HELD_SINCE: Release = (3, 9)
# from then on: (padded head dim, "tangents" or "plain", family) -> held tiles
HELD = {
    (64, "plain", "backward_query"): 1,
    (80, "tangents", "forward"): 0,
    (80, "tangents", "backward_key"): 1,
    (96, "tangents", "backward_key"): 0,
    (96, "tangents", "backward_sums"): 0,
    (96, "tangents", "backward_query"): 0,
}

# architecture -> padded head dim -> "tangents" or "plain" -> family -> tile
PIPELINES: dict[str, dict[int, dict[str, Families]]] = {
    "sm_90": {
        64: {
            "tangents": {
                "forward": Pipeline(128, 3),
                "backward_key": Pipeline(32, 4, held=1),
                "backward_query": Pipeline(64, 3, held=1),
            },
            "plain": {
                "forward": Pipeline(128, 3),
                "backward_key": Pipeline(64, 4),
                "backward_query": Pipeline(128, 3, held=2),
            },
        },
        80: {
            "tangents": {
                "forward": Pipeline(64, 4, held=1),
                "backward_key": Pipeline(64, 3, held=3, parts=2),
                "backward_sums": Pipeline(64, 2, held=2, parts=2, slots=2),
                "backward_value": Pipeline(64, 3),
                "backward_query": Pipeline(32, 4, held=2),
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
                "backward_key": Pipeline(32, 3, held=2),
                "backward_sums": Pipeline(64, 2, held=1, parts=2, slots=1),
                "backward_value": Pipeline(64, 3),
                "backward_query": Pipeline(32, 4, held=2),
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
    },
}
