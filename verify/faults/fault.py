"""One mutation: a statement of flashjvp to replace by a wrong one, and the check and case that must catch the bug."""

from dataclasses import dataclass
from typing import Any, Literal

from ..cases.case import Case
from ..cases.catalogue import CASES

Stage = Literal[
    "forward", "jvp", "preprocess", "both sides", "query side", "key side", "tiles", "launch", "tiled", "wiring",
    "reference", "pipelines", "repeated calls", "several processes", "packed sequences", "windows, block masks",
]  # fmt: skip

# Checks of checks/emulated.py. They always run on the CPU, since a planted race could hang a GPU.
EMULATED_CHECKS = (
    "emulated",
    "emulated-bfloat16",
    "emulated-dq-accum",
    "per-tensor-scaling",
    "per-tensor-scaling-in-order",
    "emulated-finite-masks",
    "high-scaling",
    "emulated-block-masks",
    "emulated-persistent",
    "emulated-pairs",
    "emulated-windows",
    "emulated-packed",
    "replayed",
)

_ONE: dict[str, Any] = {"batch": (1,), "q_heads": 1, "kv_heads": 1}
_PLAIN: dict[str, Any] = {"tangents": (), "cotangents": ("o",)}
# Served by the warp-specialised kernels, but for short_heads, which is as quick as the interpreter gets.
HOPPER_CASES = (
    Case("hopper_36", **_ONE, m=40, n=50, d=36, dv=44),
    Case("hopper_64", **_ONE, m=140, n=200, d=64, dv=64),
    Case("hopper_64_long", **_ONE, m=70, n=1500, d=64, dv=64),
    Case("hopper_64_gqa", batch=(1,), q_heads=4, kv_heads=2, m=40, n=70, d=64, dv=64),
    Case("hopper_64_causal", **_ONE, m=150, n=150, d=64, dv=64, is_causal=True),
    Case("hopper_64_plain", **_ONE, m=130, n=150, d=64, dv=64, **_PLAIN),
    Case("hopper_72", **_ONE, m=70, n=150, d=72, dv=72, mask="bool"),
    Case("hopper_72_gqa", batch=(1,), q_heads=2, kv_heads=1, m=150, n=140, d=72, dv=72, mask="bool"),
    Case("hopper_96", **_ONE, m=150, n=140, d=96, dv=96, mask="bool"),
    Case("hopper_96_many_tiles", **_ONE, m=640, n=140, d=96, dv=96, mask="bool"),
    Case("hopper_128", **_ONE, m=150, n=140, d=128, dv=128),
    Case("hopper_128_many_tiles", **_ONE, m=640, n=140, d=128, dv=128),
    Case("hopper_128_causal_gqa", batch=(1,), q_heads=2, kv_heads=1, m=200, n=140, d=128, dv=128, is_causal=True),
    Case("hopper_128_plain", **_ONE, m=130, n=150, d=128, dv=128, **_PLAIN),
    Case("hopper_160", **_ONE, m=70, n=90, d=160, dv=160),
    Case("hopper_192", **_ONE, m=70, n=150, d=192, dv=192),
    Case("hopper_192_gqa", batch=(1,), q_heads=2, kv_heads=1, m=70, n=70, d=192, dv=192),
    Case("hopper_192_mask", **_ONE, m=140, n=90, d=192, dv=192, mask="bool"),
    Case("hopper_192_empty_rows", **_ONE, m=70, n=70, d=192, dv=192, mask="bool", mask_shape="empty_rows"),
    Case("hopper_192_additive", batch=(1,), q_heads=2, kv_heads=1, m=70, n=70, d=192, dv=192, mask="additive"),
    Case("hopper_256", **_ONE, m=70, n=90, d=256, dv=256),
    Case("hopper_mask", batch=(1,), m=70, n=150, d=64, dv=64, mask="bool"),
    Case("hopper_mask_128", **_ONE, m=70, n=150, d=128, dv=128, mask="bool"),
    Case("hopper_mask_plain", **_ONE, m=70, n=300, d=64, dv=64, mask="bool", **_PLAIN),
    Case("hopper_mask_per_key", **_ONE, m=140, n=150, d=64, dv=64, mask="bool", mask_shape="per_key"),
    Case("hopper_mask_empty_rows", **_ONE, m=70, n=80, d=64, dv=64, mask="bool", mask_shape="empty_rows"),
    Case("hopper_additive", batch=(1,), q_heads=2, kv_heads=2, m=70, n=150, d=64, dv=64, mask="additive"),
    Case("hopper_additive_128", **_ONE, m=138, n=150, d=128, dv=128, mask="additive"),
    Case("hopper_additive_plain", batch=(1,), m=70, n=144, d=64, dv=64, mask="additive", **_PLAIN),
    Case("hopper_additive_empty_rows", **_ONE, m=70, n=80, d=64, dv=64, mask="additive", mask_shape="empty_rows"),
    Case("hopper_sequence_major", batch=(1,), m=33, n=65, d=64, dv=64, layout="sequence_major"),
    Case("hopper_cotangent_o", **_ONE, m=40, n=50, d=64, dv=64, cotangents=("o",)),
    Case("hopper_q_t_alone", **_ONE, m=40, n=50, d=64, dv=64, tangents=("q",)),
    Case("hopper_64_large_mu", **_ONE, m=130, n=150, d=64, dv=64, kind="large_mu"),
    Case("hopper_72_low_scores", **_ONE, m=70, n=150, d=72, dv=72, kind="low_scores"),
    Case("hopper_128_low_scores", **_ONE, m=70, n=140, d=128, dv=128, kind="low_scores"),
    Case("hopper_mask_128_low_scores", **_ONE, m=70, n=140, d=128, dv=128, kind="low_scores", mask="bool"),
    Case("hopper_blocks", batch=(1,), q_heads=2, kv_heads=1, m=300, n=420, d=64, dv=64),
    Case("hopper_items", batch=(3,), q_heads=2, kv_heads=1, m=130, n=150, d=64, dv=64),
    Case("hopper_items_128", batch=(8,), q_heads=1, kv_heads=1, m=100, n=200, d=128, dv=128),
    Case("hopper_blocks_72", **_ONE, m=270, n=300, d=72, dv=72),
    Case("hopper_blocks_128", batch=(1,), q_heads=2, kv_heads=1, m=270, n=300, d=128, dv=128),
    Case("hopper_sequences", batch=(1,), q_heads=2, kv_heads=1, m=300, n=420, d=64, dv=64, is_causal=True),
    Case("hopper_sequences_128", batch=(1,), q_heads=2, kv_heads=1, m=300, n=420, d=128, dv=128, is_causal=True),
    Case("short_heads", batch=(), m=5, n=7, d=16, dv=16),
    Case("hopper_heads", batch=(1,), m=40, n=50, d=64, dv=64),
)  # fmt: skip
# Which every layout of checks/distributed.py divides evenly: a message that goes astray still fits.
DIVIDED_CASES = (
    Case("divided", batch=(2,), q_heads=6, kv_heads=2, m=48, n=36, d=16, dv=8),
    Case("divided_causal", batch=(), q_heads=4, kv_heads=4, m=48, n=36, d=16, dv=16, is_causal=True),
    Case("divided_mask", batch=(), q_heads=2, kv_heads=2, m=48, n=36, d=16, dv=16, mask="bool"),
    Case("divided_bias", batch=(), q_heads=2, kv_heads=2, m=48, n=36, d=16, dv=16, mask="additive"),
)  # fmt: skip
CASE_BY_NAME = {case.name: case for case in (*CASES, *HOPPER_CASES, *DIVIDED_CASES)}


@dataclass(frozen=True)
class Fault:
    """A mutation of one file of flashjvp: `statement` in the place of the one marked `# mutate: marker` (markers.py).

    What must catch it is a check on a case: "float64" (all results against dense attention), or a name in IDENTITIES
    (oracles/identities.py), IN_PYTORCH (checks/registry.py) or EMULATED (checks/emulated.py).
    """

    name: str
    stage: Stage
    file: str
    marker: str
    statement: str
    case: str = "lengths_80_31"
    check: str = "float64"

    @property
    def backend(self) -> Literal["triton", "tiled", "reference"]:
        if self.file == "backends/reference.py":
            return "reference"
        of_triton = self.file.startswith(("kernels/", "backends/triton"))
        return "triton" if of_triton or self.check in EMULATED_CHECKS else "tiled"
