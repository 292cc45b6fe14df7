"""Tile tables: block sizes, warps and pipeline stages of each kernel family by kind of product and head dim.

Registers decide: a tile that spills loses more than a larger one gains. The tiles need the shared memory of compute
capability 9.x and 10.x (backends.py admits no other GPU).
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Query rows and key rows of a tile, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# family -> largest padded head dim -> tile
Table = dict[str, dict[int, Tile]]

# float16 and bfloat16 on tensor cores.
_HALF: Table = {
    "forward": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 16, 8, 2)},
    "rowsums": {64: Tile(64, 0, 4, 1), 128: Tile(32, 0, 4, 1), 256: Tile(16, 0, 4, 1)},
    "backward_query": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    "backward_key": {64: Tile(64, 64, 4, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 32, 4, 1)},
    "backward_value": {64: Tile(64, 64, 4, 2), 128: Tile(32, 128, 8, 3), 256: Tile(16, 64, 8, 1)},
    "backward_key_value": {64: Tile(32, 64, 4, 2)},
}
# float32 rounded to TF32 on tensor cores.
_TF32: Table = {
    "forward": {64: Tile(64, 32, 8, 2), 128: Tile(64, 16, 8, 2), 256: Tile(32, 16, 8, 1)},
    "rowsums": _HALF["rowsums"],
    "backward_query": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 4, 1)},
    "backward_key": {64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 4, 1)},
    "backward_value": {64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 4, 1)},
    "backward_key_value": {64: Tile(16, 32, 8, 1)},
}
# IEEE float32 without tensor cores: a thread holds whole rows of both factors, so tiles are small.
_IEEE: Table = {
    "forward": {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
    "rowsums": _HALF["rowsums"],
    "backward_query": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
    "backward_key": {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
    "backward_value": {64: Tile(16, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
    "backward_key_value": {64: Tile(16, 16, 4, 1)},
}
TABLES = {"half": _HALF, "tf32": _TF32, "ieee": _IEEE}
_IEEE_CHUNK = 32


def kind_of_product(dtype: torch.dtype, device: torch.device) -> str:
    """Which table serves a type: float32 products are IEEE unless PyTorch's matmul precision allows TF32.

    The interpreter (CPU tensors) has no registers to spare and is quickest with the large tiles of the half types.
    """
    if dtype != torch.float32 or device.type == "cpu":
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def chunk_widths(width: int, kind: str) -> tuple[int, ...]:
    """Powers of two, at least 16, that cover a head dim.

    Tensor-core tiles take at most two, with the least padding: 72 -> (64, 16). IEEE products take many narrow ones,
    because a thread holds a row of a chunk.
    """
    if width <= 16:
        return (16,)
    if kind == "ieee":
        return (_IEEE_CHUNK,) * -(-width // _IEEE_CHUNK)
    top = 1 << (width.bit_length() - 1)
    if width == top:
        return (top,)
    rest = max(16, 1 << (width - top - 1).bit_length())
    return (2 * top,) if rest == top else (top, rest)


def lookup(family: str, kind: str, width: int) -> Tile:
    """The tile of a kernel family for head dims padded to `width`."""
    return TABLES[kind][family][_bucket(width)]


def _bucket(width: int) -> int:
    return 64 if width <= 64 else 128 if width <= 128 else 256


def key_side_launches(
    outputs: tuple[object, object, object, object], width: int
) -> list[tuple[str, tuple[object, ...]]]:
    """How the key-side gradients (d_k, d_v, d_k_t, d_v_t) are split into launches: (family, outputs of that launch).

    Four accumulators fit the registers up to a head dim of 64.
    """
    d_k, d_v, d_k_t, d_v_t = outputs
    keys, values = d_k is not None or d_k_t is not None, d_v is not None or d_v_t is not None
    if keys and values and width <= 64:
        return [("backward_key_value", outputs)]
    launches: list[tuple[str, tuple[object, ...]]] = []
    if values:
        launches.append(("backward_value", (None, d_v, None, d_v_t)))
    if keys:
        launches.append(("backward_key", (d_k, None, d_k_t, None)))
    return launches
