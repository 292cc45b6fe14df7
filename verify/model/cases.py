"""The cases of `python -m verify model`: part, network, type, backend, and how blocks run (compiled, recomputed)."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

from flashjvp.backends import select
from tvm_ref.model.dit import DiTConfig

from ..oracles.attention import Backend
from ..oracles.network import tiny
from ..run.plan import BACKENDS

Part = Literal[
    "block", "network", "func.jvp", "difference", "tvm", "detached", "meanflow", "operators"
]  # what is evaluated; `detached` is tvm without gradient through dF/ds, `operators` and `difference` as in PARTS
Precision = Literal["float64", "float32", "bfloat16"]
Compiled = Literal["no", "aot_eager", "inductor"]
Recompute = Literal["none", "full", "selective"]
Residual = Literal["float32", "bfloat16"]  # the type of the stream and its tangent, as run.residual

PARTS: dict[str, str] = {
    "block": "a block on (x, x_t) pairs: values, tangents, gradients of inputs and weights",
    "network": "a DiT along x, t and s: F, F_t, gradients of the weights",
    "func.jvp": "the same by torch.func.jvp of the plain network",
    "difference": "gradients through the JVP against difference quotients, without the dense network",
    "tvm": "Terminal Velocity Matching as the trainer evaluates it: terms, gradients",
    "detached": "the same without gradient through dF/ds",
    "meanflow": "MeanFlow as the trainer evaluates it",
    "operators": "no layer_norm or batch_norm of torch is called (docs/layer-norm-jvp.md)",
}
LOSSES = ("tvm", "detached", "meanflow")

NETWORKS: dict[str, DiTConfig] = {
    "class-conditional": tiny(),
    "unconditional": tiny(num_classes=0),
    "without guidance": tiny(guidance=False),
    "layer norm": tiny(norm="layer"),
    "no qk norm": tiny(qk_norm=False),
    "no modulation norm": tiny(modulation_norm=False),
    "as a plain DiT": tiny(norm="layer", qk_norm=False, modulation_norm=False),
    "one token": tiny(image_size=1, patch=1, channels=2),
    "other sizes": tiny(image_size=9, patch=3, channels=1, width=28, heads=1, mlp_ratio=1.5, depth=3),
    "one block": tiny(depth=1),
    "XL/2 width": tiny(image_size=32, channels=4, width=1152, depth=1, heads=18),  # 256 tokens; for a GPU
    "16384 tokens": tiny(image_size=256, channels=4, width=64, depth=1, heads=1),
}
LONG = "16384 tokens"
LONG_MEMORY = 100 * 2**30  # bytes that a GPU has for the dense network of LONG in float64
SMALL = tuple(name for name in NETWORKS if name not in ("one block", "XL/2 width", LONG))
MAIN = "class-conditional"


@dataclass(frozen=True)
class ModelCase:
    """One question. `precision` bfloat16 is autocast of a float32 network; `compiled` and `recompute` are per block."""

    part: Part
    network: str = MAIN
    precision: Precision = "float64"
    backend: Backend = "reference"
    compiled: Compiled = "no"
    recompute: Recompute = "none"
    residual: Residual = "float32"

    @property
    def name(self) -> str:
        """What --case takes: the fields, those of no effect left out."""
        residual = f"residual-{self.residual}"
        ways = (self.compiled, "no"), (self.recompute, "none"), (residual, "residual-float32")
        unusual = [way for way, usual in ways if way != usual]
        return "/".join([self.part, self.network.replace(" ", "-"), self.precision, self.backend, *unusual])

    @property
    def way(self) -> str:
        """How the blocks run, in words."""
        words = {"no": "", "aot_eager": "compile (aot_eager)", "inductor": "compile", "none": ""}
        found = [words[self.compiled], words.get(self.recompute, f"checkpoint ({self.recompute})")]
        found += ["residual stream in bfloat16"] * (self.residual != "float32")
        return ", ".join(filter(None, found)) or "eager"

    @property
    def dtype(self) -> torch.dtype:
        """The type that attention computes in."""
        return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]

    @property
    def config(self) -> DiTConfig:
        """The network, on the case's backend."""
        fields = vars(NETWORKS[self.network]) | {"attention_backend": self.backend}
        return DiTConfig(**fields)


@dataclass
class ModelPlan:
    """The cases of a run on a device, and what it leaves out, in words."""

    device: str
    cases: list[ModelCase] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, cases: Iterable[ModelCase]) -> None:
        """Adds the cases that can run here and are not in the plan yet. Why others cannot goes to `skipped`, once."""
        device = torch.device(self.device)
        for case in cases:
            reason = select.obstacle(case.backend, device, case.dtype)
            reason = f"{case.backend} in {case.precision}: {reason}" if reason else None
            if reason is None and case.compiled == "inductor":
                reason = missing_compiler(device)
            if reason is None and case not in self.cases:
                self.cases.append(case)
            elif reason and reason not in self.skipped:
                self.skipped.append(reason)


def model_plan(device: str, quick: bool) -> ModelPlan:
    """Every network in float64; every part, backend and type; every way to run blocks; on a GPU also XL/2's width."""
    plan = ModelPlan(device)
    gpu = torch.device(device).type == "cuda"
    fast: Backend = "triton" if gpu else "tiled"
    networks = (MAIN, "as a plain DiT") if quick else SMALL
    plan.add(ModelCase("operators", name) for name in SMALL)
    plan.add(ModelCase(part, name) for part in ("network", "func.jvp", "difference", "tvm") for name in networks)
    plan.add(ModelCase(part) for part in ("block", "detached", "meanflow"))
    types: tuple[Precision, ...] = ("float64", "float32", "bfloat16")
    for backend in (fast,) if quick else BACKENDS:
        # The interpreter of a CPU is slow: one token row is enough to see that a network reaches it.
        name, parts = ("one block", ("tvm",)) if backend == "triton" and not gpu else (MAIN, PARTS)
        evaluated = [part for part in parts if part not in ("difference", "operators")]
        plan.add(ModelCase(part, name, kind, backend) for part in evaluated for kind in types)  # type: ignore[arg-type]
    recomputations: tuple[Recompute, ...] = ("none", "full", "selective")
    trained: tuple[Part, ...] = ("tvm",) if quick else ("block", "tvm", "meanflow")
    for part in trained:
        for kind in types:
            plan.add(ModelCase(part, MAIN, kind, fast, recompute=x) for x in recomputations)
            plan.add(ModelCase(part, "one block", kind, fast, "aot_eager", x) for x in recomputations)
    streamed: tuple[Part, ...] = ("tvm",) if quick else ("network", "tvm", "detached", "meanflow")
    plan.add(ModelCase(part, MAIN, "bfloat16", fast, residual="bfloat16") for part in streamed)
    if gpu or not quick:  # minutes on a CPU
        plan.add(ModelCase("tvm", "one block", "bfloat16", fast, "inductor", x) for x in recomputations)
        plan.add([ModelCase("tvm", "one block", "float32", fast, "inductor")])
    if gpu:
        wide: tuple[Part, ...] = ("block", "tvm")
        plan.add(ModelCase(part, "XL/2 width", kind, fast) for part in wide for kind in types if kind != "float64")
        plan.add([ModelCase("tvm", "XL/2 width", "bfloat16", fast, "inductor", "selective")])
        plan.add([ModelCase("block", "XL/2 width", "bfloat16", fast, "inductor")])
        memory = torch.cuda.get_device_properties(device).total_memory
        if memory >= LONG_MEMORY:
            plan.add(ModelCase("tvm", LONG, "bfloat16", fast, recompute=x) for x in ("none", "full"))
        else:
            gib = f"expected a GPU with {LONG_MEMORY / 2**30:.0f} GiB, got {memory / 2**30:.0f}"
            plan.skipped.append(f"{LONG}: {gib}, for the dense network in float64")
    return plan


def missing_compiler(device: torch.device) -> str | None:
    """Why inductor cannot compile for a device, or None."""
    compilers = (os.environ.get("CXX", "g++"), "clang++", "c++")
    if device.type == "cuda" or any(map(shutil.which, compilers)):
        return None
    return "inductor: expected a C++ compiler, found none"
