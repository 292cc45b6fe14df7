"""The calls whose kernels are compiled: a deliberate sample of them, or the full product of head dims and options."""

import itertools
from dataclasses import dataclass, fields
from typing import Any

from flashjvp.backends.select import MAX_IEEE_IN_99_KB, WITH_99_KB

IN_99_KB = [f"sm_{major}{minor}" for major, minor in WITH_99_KB]
KINDS = ("half", "tf32", "ieee")
PARTIAL = ("window", "blocks", "packed")
ADDITIVE = ("additive", "float32")
HEAD_DIMS = (16, 32, 40, 64, 72, 96, 128, 160, 192, 256)  # each way to cover a head dim by chunks, and their largest


@dataclass(frozen=True)
class Configuration:
    """One call of attention, forward and backward: the input precision (half is bfloat16, high the same with
    precision="high"), head dims and options.

    `tangents` names the inputs that have one (none: plain attention), `mask` is "", "bool", "additive", "float32" (an
    additive one of that type), "learned" (with a gradient, and a tangent where there are any), "dropout" (of
    probabilities, without a mask), or which kernels of their own serve the call: "window", "blocks" (a block mask),
    "packed" (sequences). `group` are the query heads of a key head, `ordered` is PyTorch's deterministic mode, `short`
    means few enough rows for persistent kernels.
    """

    architecture: str
    kind: str
    d: int
    dv: int
    tangents: str = "qkv"
    causal: bool = False
    mask: str = ""
    group: int = 1
    ordered: bool = False
    short: bool = False


@dataclass(frozen=True)
class Kernel(Configuration):
    """What one kernel of a configuration compiled to; `tile` is rows of queries x rows of keys x warps x stages.

    Spilled bytes are those of a thread; `loop_spills` counts the instructions of inner loops that touch them, and
    `loop_spill_share` is their largest share of a loop.
    """

    family: str = ""
    tile: str = ""
    registers: int = 0
    spill_bytes: int = 0
    loop_spills: int = 0
    loop_spill_share: float = 0.0
    shared_bytes: int = 0
    tensor_core: int = 0
    isa: str = ""
    failure: str = ""


COLUMNS = [field.name for field in fields(Kernel)]


def sample(architecture: str) -> list[Configuration]:
    """bfloat16 with all tangents in every head dim, float32 in fewer, and each option once on top of that.

    The options are those that change the code: causal, masks, missing tangents, none at all, unequal and unaligned head
    dims (36: rows that do not start at multiples of 16 bytes), grouped queries, deterministic mode.
    """
    dims = {"half": HEAD_DIMS, "tf32": (64, 72, 128, 256), "ieee": (64, 128, 256)}
    bases = [
        Configuration(architecture, kind, d, d)
        for kind in KINDS
        for d in dims[kind]
        if _is_served(architecture, kind, d)
    ]
    options: list[dict[str, Any]] = [{"tangents": tangents} for tangents in ("", "q", "k", "v")]
    options += [
        {"causal": True},
        {"mask": "bool"},
        {"mask": "additive"},
        {"mask": "bool", "causal": True},
        {"group": 4},
        {"mask": "learned"},
        {"mask": "dropout"},
        {"mask": "float32"},
    ]
    extra = [Configuration(architecture, "half", 64, 64, **option) for option in options]
    extra += [Configuration(architecture, "half", d, d, **option) for d in (128, 256) for option in options[4:6]]
    extra += [Configuration(architecture, "half", d, d, mask=mask) for d in (72, 96, 128) for mask in ADDITIVE]
    extra += [Configuration(architecture, "half", d, d, "", mask=mask) for d in (64, 72, 128) for mask in ADDITIVE]
    extra += [Configuration(architecture, "half", d, d, mask="additive", ordered=True) for d in (72, 96, 128)]
    extra += [Configuration(architecture, "half", d, d, mask=mask) for d in (160, 192) for mask in ("bool", *ADDITIVE)]
    extra += [Configuration(architecture, "half", 256, 256, mask=mask) for mask in ADDITIVE]
    extra += [Configuration(architecture, "half", d, d, mask="bool", causal=True) for d in (160, 192, 256)]
    extra += [Configuration(architecture, kind, 64, 64, mask="bool") for kind in KINDS[1:]]
    extra += [Configuration(architecture, "ieee", 128, 128, mask=mask) for mask in ("learned", "dropout")]
    extra += [Configuration(architecture, "half", d, d, ordered=True) for d in (72, 96, 128)]
    extra += [Configuration(architecture, "high", d, d) for d in (64, 72, 96, 128)]
    extra += [Configuration(architecture, "high", 64, 64, "", mask="bool")]
    extra += [Configuration(architecture, "half", d, dv) for d, dv in ((36, 36), (64, 128), (128, 64), (256, 64))]
    extra += [Configuration(architecture, "half", d, d, mask=kind) for kind in PARTIAL for d in (64, 72, 128)]
    extra += [Configuration(architecture, "tf32", 64, 64, mask=kind) for kind in PARTIAL]
    extra += [Configuration(architecture, "half", 64, 64, "", mask=kind) for kind in PARTIAL]
    extra += [Configuration(architecture, "half", 64, 64, causal=True, mask="packed")]
    kinds = ("blocks", "window")  # which may sum d_q in any order
    extra += [
        Configuration(architecture, "half", d, d, mask=kind, ordered=True) for kind in kinds for d in (72, 96, 128)
    ]
    extra += [Configuration(architecture, "half", 96, 96, mask=kind) for kind in PARTIAL]
    extra += [Configuration(architecture, "half", 128, 128, "", mask=kind) for kind in PARTIAL]
    if architecture == "sm_90":  # others have no persistent kernels
        extra += [Configuration(architecture, "half", d, d, short=True) for d in (64, 128)]
        extra += [Configuration(architecture, "half", 64, 64, group=4, short=True)]
    return bases + extra


def product(architecture: str) -> list[Configuration]:
    """Every kind, head dim, subset of tangents, mask and direction."""
    subsets = ("", "q", "k", "v", "qk", "qv", "kv", "qkv")
    options = itertools.product(KINDS, HEAD_DIMS, subsets, (False, True), ("", "bool", "additive"))
    return [
        Configuration(architecture, kind, d, d, tangents, causal, mask)
        for kind, d, tangents, causal, mask in options
        if _is_served(architecture, kind, d)
    ]


def _is_served(architecture: str, kind: str, d: int) -> bool:
    """Whether there are kernels for a head dim."""
    return kind != "ieee" or architecture not in IN_99_KB or d <= MAX_IEEE_IN_99_KB
