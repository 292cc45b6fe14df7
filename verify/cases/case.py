"""A case: one call of attention described as data, by its shapes, options and kind of numbers.

inputs.py makes the tensors of a case; catalogue.py lists the cases that are verified.
"""

from dataclasses import dataclass
from typing import Literal

MaskKind = Literal["bool", "additive", "additive_float32"]
MaskShape = Literal["full", "per_key", "per_row", "per_head", "per_batch", "matrix", "empty_rows"]
Layout = Literal["contiguous", "packed", "sequence_major", "expanded", "padded", "column_major"]
Kind = Literal["normal", "large_mu", "one_hot", "constant_keys", "low_scores", "zeros"]

TANGENT_SUBSETS: tuple[tuple[str, ...], ...] = (
    ("q", "k", "v"),
    ("q",),
    ("k",),
    ("v",),
    ("q", "k"),
    ("q", "v"),
    ("k", "v"),
    (),
)
COTANGENT_SUBSETS: tuple[tuple[str, ...], ...] = (("o", "o_t"), ("o",), ("o_t",))


@dataclass(frozen=True)
class Case:
    """One call of attention: its shapes, options and kind of numbers, but no tensors yet.

    `batch` are the leading dims. `tangents` names the inputs that have a tangent, `cotangents` the outputs that have a
    cotangent. Without tangents it is plain attention, whose only output is o. `magnitude` is the typical size of a
    score.
    """

    name: str
    batch: tuple[int, ...] = (2,)
    q_heads: int = 2
    kv_heads: int = 2
    m: int = 64
    n: int = 64
    d: int = 32
    dv: int = 32
    mask: MaskKind | None = None
    mask_shape: MaskShape = "full"
    is_causal: bool = False
    scale: float | None = None
    layout: Layout = "contiguous"
    tangent_layout: Layout = "contiguous"
    tangents: tuple[str, ...] = ("q", "k", "v")
    cotangents: tuple[str, ...] = ("o", "o_t")
    magnitude: float = 1.0
    kind: Kind = "normal"

    def __post_init__(self) -> None:
        if not self.tangents and self.cotangents != ("o",):
            raise ValueError(f"case {self.name}: without tangents the cotangents must be ('o',), got {self.cotangents}")
        if self.layout == "packed" and (self.q_heads, self.m, self.d) != (self.kv_heads, self.n, self.dv):
            raise ValueError(f"case {self.name}: packed needs q, k and v of one shape")

    def __str__(self) -> str:
        return self.name
