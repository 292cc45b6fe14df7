"""Tiles of the warp-specialised kernels in hopper/, by architecture, head dim and family: the streamed rows of a tile,
and the tiles of the ring. A family named `_plain` is the one without tangents.

CANDIDATES compile without spills that matter and pass the emulator (verify/hopper_emulator.py). PIPELINES are in use:
a head dim gets there when its families have been verified and timed on a GPU, and until then tables.py serves it.
"""

Pipelines = dict[str, dict[int, dict[str, tuple[int, int]]]]

CANDIDATES: Pipelines = {
    "sm_90": {
        64: {
            "forward": (64, 3),
            "forward_plain": (128, 3),
            "backward_key": (32, 4),
            "backward_key_plain": (64, 4),
            "backward_query": (64, 3),
            "backward_query_plain": (64, 4),
        },
        128: {
            "forward": (64, 2),
            "forward_plain": (128, 2),
            "backward_key": (32, 2),
            "backward_key_plain": (64, 3),
            "backward_query": (32, 3),
            "backward_query_plain": (64, 3),
            "backward_value": (64, 2),
        },
    },
}
PIPELINES: Pipelines = {}
