"""Tiles of the warp-specialised kernels in hopper/, by architecture, head dim and family.

A family named `_plain` is the one without tangents. `backward_key_sums` also adds query gradients in global memory, in
any order; where it is missing, or is not allowed to, `backward_query` computes them.
"""

from typing import NamedTuple


class Pipeline(NamedTuple):
    """What a kernel streams, and what it holds."""

    rows: int  # of a streamed tile
    stages: int  # tiles of the ring
    held: int = 0  # own tiles in registers, the first ones: their products read less shared memory


Pipelines = dict[str, dict[int, dict[str, Pipeline]]]

PIPELINES: Pipelines = {
    "sm_90": {
        64: {
            "forward": Pipeline(128, 3),
            "forward_plain": Pipeline(128, 3),
            "backward_key": Pipeline(32, 4, held=1),
            "backward_key_plain": Pipeline(64, 4),
            "backward_key_sums_plain": Pipeline(64, 4),
            "backward_query": Pipeline(64, 3, held=1),
            "backward_query_plain": Pipeline(64, 4),
        },
        128: {
            "forward": Pipeline(64, 2),
            "forward_plain": Pipeline(128, 2),
            "backward_key": Pipeline(32, 2, held=1),
            "backward_key_plain": Pipeline(64, 3),
            "backward_key_sums": Pipeline(32, 2),
            "backward_key_sums_plain": Pipeline(64, 3),
            "backward_query": Pipeline(32, 3, held=1),
            "backward_query_plain": Pipeline(64, 3),
            "backward_value": Pipeline(64, 2),
        },
    },
}
