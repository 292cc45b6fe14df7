"""Tile tables: block sizes, warps and stages of each kernel family by architecture, input precision and head dim.

Registers decide: a tile that spills loses more than a larger one gains. `python -m verify codegen` shows what every
entry compiles to. `half` is float16 and bfloat16 on tensor cores, `tf32` float32 rounded for them, `bf16x6` float32 in
six products of bfloat16 parts, with errors like those of float32 products, `ieee` float32 without tensor cores: there a
thread holds rows of both operands, so tiles are small.
"""

from typing import NamedTuple

import torch

from ... import environment
from . import hopper_tables as tables_of_pipelines
from . import selfcheck
from .hopper_tables import (
    MEASURED,
    MEASURED_WIDE,
    PIPELINES,
    REGISTER_OPERANDS,
    REGISTER_OPERANDS_SINCE,
    Families,
    Persistent,
    Release,
)
from .tables import TILES


class Tile(NamedTuple):
    """Query rows and key rows of a tile, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def block(self) -> tuple[int, int]:
        """The TILE of a kernel."""
        return self.block_m, self.block_n


# family -> largest padded head dim -> tile
Table = dict[str, dict[int, Tile]]

# architecture -> input precision -> family -> largest padded head dim -> tile
TABLES: dict[str, dict[str, Table]] = {
    arch: {
        precision: {
            family: {width: Tile(*tile) for width, tile in sorted(tiles.items())} for family, tiles in table.items()
        }
        for precision, table in precisions.items()
    }
    for arch, precisions in TILES.items()
}
# The same with dropout or a tangent of the mask, where these would spill with the tile above.
WITH_OPTIONS: dict[tuple[str, str, str, int], Tile] = {
    ("sm_90", "half", "forward", 128): Tile(128, 32, 8, 2),
    ("sm_90", "half", "forward", 192): Tile(128, 16, 8, 2),
    ("sm_100", "half", "backward_query", 256): Tile(16, 32, 8, 2),
}
# device -> key of TABLES, filled at first use
ARCHITECTURES: dict[torch.device, str] = environment.kept({})
# The input precisions of products whose operands have at most 11 significant bits.
ROUNDED = ("half", "tf32")
_IEEE_CHUNK = 32


def architecture(device: torch.device) -> str:
    """Whose tables serve a device: a key of TABLES, asked of the driver once per device."""
    found = ARCHITECTURES.get(device)
    if found is None:
        found = ARCHITECTURES[device] = _detect(device)
    return found


def _detect(device: torch.device) -> str:
    """The interpreter (CPU tensors) takes the tiles of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = environment.capability(device.index)
    return {9: "sm_90", 10: "sm_100"}.get(major, f"sm_{major}{minor}")


def input_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Which table serves a type: float32 products are IEEE unless PyTorch's matmul precision allows TF32.

    The interpreter (CPU tensors) has no registers to spare and is quickest with the large tiles of the half types.
    """
    if dtype != torch.float32 or device.type == "cpu":
        return "half"
    return selfcheck.precision() or ("tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee")


def high_precision(device: torch.device) -> str:
    """Which table serves precision="high" (backends/high.py): that of TF32, whatever PyTorch's setting and the type."""
    return "half" if device.type == "cpu" else "tf32"


def float32_products(device: torch.device, head_dim: int) -> str:
    """How float32 products are computed where TF32 is not allowed: on tensor cores, where there are tiles for it."""
    return "bf16x6" if head_dim <= 64 and "bf16x6" in TABLES[architecture(device)] else "ieee"


def chunk_widths(width: int, precision: str) -> tuple[int, ...]:
    """Powers of two, at least 16, that cover a head dim.

    Tensor-core tiles take at most two, with the least padding: 72 -> (64, 16). Narrower ones spill in float32, where it
    is (64, 32), and beside 128 columns, where it is (128, 64). IEEE products take many narrow ones, because a thread
    holds a row of a chunk.
    """
    if width <= 16:
        return (16,)
    if precision == "ieee":
        return (_IEEE_CHUNK,) * -(-width // _IEEE_CHUNK)
    top = 1 << (width.bit_length() - 1)
    if width == top:
        return (top,)
    least = 64 if top >= 128 else 16 if precision == "half" else 32
    rest = max(least, 1 << (width - top - 1).bit_length())
    return (2 * top,) if rest >= top else (top, rest)


def padded_width(head_dim: int) -> int:
    """A head dim as the tables of the half types have it: padded to the columns of its chunks, and from 33 to 64."""
    width = sum(chunk_widths(head_dim, "half"))
    return 64 if 32 < width <= 64 else 160 if 128 < head_dim <= 160 else width


def pipeline_chunks(width: int) -> tuple[int, ...]:
    """The column chunks of a padded head dim in the warp-specialised kernels, at most 128 columns each."""
    return {160: (128, 32), 256: (128, 128)}.get(width) or chunk_widths(width, "half")


def lookup(device: torch.device, precision: str, family: str, width: int, options: bool = False) -> Tile:
    """The tile of a kernel family for head dims padded to `width`; `options`: with dropout or a tangent of the mask."""
    arch = architecture(device)
    for largest, tile in TABLES[arch][precision][family].items():
        if largest >= width:
            return WITH_OPTIONS.get((arch, precision, family, largest), tile) if options else tile
    raise KeyError(f"{family} has no tile for head dims padded to {width}")


def pipelines(device: torch.device, precision: str, width: int) -> dict[str, Families]:
    """Tiles of the warp-specialised kernels for this padded head dim; none where they do not serve it."""
    tiles = _TILES.get(_architecture_of_pipelines(device, precision), {}).get(width, {})
    return tiles if tiles and _why_not_triton(device, width) is None else {}


def why_not_pipelines(device: torch.device, precision: str, width: int) -> str | None:
    """Why the warp-specialised kernels do not serve this input precision and this padded head dim; None if they do."""
    if device.type == "cpu":
        return "the warp-specialised kernels need a GPU: the interpreter does not run them"
    if precision not in ROUNDED:
        setting = 'torch.backends.cuda.matmul.fp32_precision = "tf32"'
        return f"float32 without TF32: {setting} allows it, with products of 11 significant bits; so do half types"
    widths = _TILES.get(_architecture_of_pipelines(device, precision), {})
    if not widths:
        return f"warp-specialised kernels are written for {' and '.join(_TILES)}, not for {architecture(device)}"
    if width not in widths:
        return f"no warp-specialised kernels for head dims padded to {width}, but to {', '.join(map(str, widths))}"
    return _why_not_triton(device, width)


def _architecture_of_pipelines(device: torch.device, precision: str) -> str:
    """The interpreter (CPU tensors) does not run them. They multiply float32 numbers where these may be rounded."""
    return "" if precision not in ROUNDED or device.type == "cpu" else architecture(device)


def _why_not_triton(device: torch.device, width: int) -> str | None:
    release = environment.triton_release()
    if release in (MEASURED if width <= 128 else MEASURED_WIDE):
        return None
    return selfcheck.why_not(release, device, width)


def persistent(width: int, family: str, streamed: int) -> Persistent | None:
    """How the persistent kernel of a family serves items that stream so many rows; None where it does not."""
    if environment.triton_release() not in tables_of_pipelines.MEASURED_PERSISTENT:
        return None
    found = tables_of_pipelines.PERSISTENT.get((width, family), ())
    return next((kernel for kernel in found if streamed <= kernel.up_to), None)


def _tiles(widths: dict[int, dict[str, Families]], release: Release) -> dict[int, dict[str, Families]]:
    """The table as a release of Triton takes it."""
    register_operands = REGISTER_OPERANDS if release >= REGISTER_OPERANDS_SINCE else {}
    return {
        width: {
            kind: {
                family: tile._replace(
                    register_operands=register_operands.get((width, kind, family), tile.register_operands)
                )
                for family, tile in families.items()
            }
            for kind, families in kinds.items()
        }
        for width, kinds in widths.items()
    }


_TILES = {arch: _tiles(widths, environment.triton_release()) for arch, widths in PIPELINES.items()}


def has_pipelines(device: torch.device, precision: str, width: int) -> bool:
    """Whether there are such tiles, in use with this Triton or not."""
    return precision in ROUNDED and device.type != "cpu" and width in PIPELINES.get(architecture(device), {})


def key_side_launches(
    outputs: tuple[object, object, object, object], width: int, precision: str
) -> list[tuple[str, tuple[object, ...]]]:
    """How the key-side gradients (d_k, d_v, d_k_t, d_v_t) are split into launches: (family, outputs of that launch).

    Four accumulators fit the registers up to a head dim of 64, but not beside operands in three parts.
    """
    d_k, d_v, d_k_t, d_v_t = outputs
    keys, values = d_k is not None or d_k_t is not None, d_v is not None or d_v_t is not None
    if keys and values and width <= 64 and precision != "bf16x6":
        return [("backward_key_value", outputs)]
    launches: list[tuple[str, tuple[object, ...]]] = []
    if values:
        launches.append(("backward_value", (None, d_v, None, d_v_t)))
    if keys:
        launches.append(("backward_key", (d_k, None, d_k_t, None)))
    return launches


def key_side_pipeline(
    tiles: Families, width: int, queries: int, both_wanted: bool = True, in_one_pass: bool = True
) -> tuple[str, bool]:
    """The family that gives d_k and d_k_t, and whether it adds query gradients up, too, in place of `backward_query`.

    Where the table has a family for it, and gradients of both sides are wanted: from DQ_ACCUM_FROM rows of queries on,
    or below ONE_PASS_DQ_ACCUM_BELOW, except in PyTorch's deterministic mode. `in_one_pass`: the call is one that
    `backward_one_pass` serves.
    """
    table = tables_of_pipelines
    sums = both_wanted and not torch.are_deterministic_algorithms_enabled()
    gains = queries >= table.DQ_ACCUM_FROM.get(width, 1)
    if in_one_pass and "backward_one_pass" in tiles and not (width in table.ONE_PASS_UNLESS_SUMMED and sums and gains):
        if width in table.ONE_PASS_DQ_ACCUM_BELOW:
            gains = queries < table.ONE_PASS_DQ_ACCUM_BELOW[width]
        return "backward_one_pass", sums and gains
    family = next(name for name in ("backward_pairs", "backward_dq_accum", "backward_key") if name in tiles)
    summed = family != "backward_key" and sums and gains
    return ("backward_key" if family == "backward_dq_accum" and not summed else family), summed
