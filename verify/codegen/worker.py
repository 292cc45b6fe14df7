"""Compiles the kernels for a GPU that need not be there, and reads registers, spills and instructions off the code.

`python -m verify.codegen.worker` reads a JSON list of configurations from its input and prints one JSON line for each:
its kernels. The launchers of flashjvp run on meta tensors, Triton is told which GPU it has, and launches only compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flashjvp.backends import triton as kernels
from flashjvp.backends import triton_varlen
from flashjvp.backends.patterns import Band, Listed
from flashjvp.kernels.launch import replaced, schedule

from .configuration import PARTIAL, Configuration, Kernel
from .handed_on import handed_on

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
}
META = torch.device("meta")
BATCH, HEADS, ROWS, SHORT = 2, 24, 4000, 256
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
Code = list[tuple[str, str]]
SASS_BRANCH = r"\bBRA\S* .*?(0x[0-9a-f]+)"


class Driver:
    """Answers what Triton asks the driver of a GPU before it compiles, for a GPU that is not there."""

    def __init__(self, architecture: str) -> None:
        self._device = list(TARGETS).index(architecture)
        self._target = TARGETS[architecture]

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def compile_all(
    configuration: Configuration, launches: Callable[[Configuration], object] | None = None
) -> list[Kernel]:
    """The kernels that `launches` launches: by default a forward and a backward of this configuration."""
    found: list[Kernel] = []
    current: dict[str, Any] = {}
    run = JITFunction.run

    def named(launch: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **constants: Any) -> None:
        tile = ", ".join(map(str, constants.items()))
        if "TILE" in constants:  # of schedule.py
            tile = "x".join(map(str, (*constants["TILE"], constants["warps"], constants["stages"])))
        family_name = f"{family}, warp-specialised" if "STAGES" in constants else family
        current.update(family=family_name, tile=tile)
        launch(call, kernel, family, *rest, **constants)

    def compile_only(kernel: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        try:
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            measured = measure(compiled)
        except Exception as error:  # whatever a compiler raises is a row of the table
            measured = {"failure": f"{type(error).__name__}: {str(error.__cause__ or error).strip()[:300]}"}
        found.append(Kernel(**asdict(configuration), **current, **measured))

    driver.set_active(Driver(configuration.architecture))
    schedule.ARCHITECTURES[META] = configuration.architecture
    torch.backends.cuda.matmul.fp32_precision = "tf32" if configuration.kind == "tf32" else "ieee"
    with (
        replaced.launch(named),
        replaced.bands_as_measured(),
        patch.object(JITFunction, "run", compile_only),
    ):
        (launches or call)(configuration)
    return found


def call(configuration: Configuration) -> None:
    """Forward and backward on meta tensors."""
    torch.use_deterministic_algorithms(configuration.ordered, warn_only=True)
    high = configuration.kind == "high"
    batch = 1 if configuration.mask == "packed" else BATCH
    dtype = torch.bfloat16 if configuration.kind in ("half", "high") else torch.float32
    heads = {"q": HEADS, "k": HEADS // configuration.group, "v": HEADS // configuration.group, "o": HEADS}
    widths = {"q": configuration.d, "k": configuration.d, "v": configuration.dv, "o": configuration.dv}

    rows = SHORT if configuration.short else ROWS

    def empty(name: str, of: torch.dtype = dtype) -> Tensor:
        x = torch.empty(batch, heads[name], rows, widths[name], dtype=of, device=META)
        return x.transpose(1, 2) if configuration.mask == "packed" else x

    q, k, v = (empty(name) for name in "qkv")
    q_t, k_t, v_t = (empty(name) if name in configuration.tangents else None for name in "qkv")
    d_o = empty("o", torch.float32 if high else dtype)
    mask = mask_t = seed = None
    of_partial = _partial(configuration.mask)
    if of_partial is not None:
        mask = of_partial.in_place_of_mask
    elif configuration.mask not in ("", "dropout"):
        of_mask = {"bool": torch.bool, "float32": torch.float32}.get(configuration.mask, dtype)
        mask = torch.empty(1, 1, rows, rows, dtype=of_mask, device=META)
    learned, dropout = configuration.mask == "learned", configuration.mask == "dropout"
    if mask is not None and learned and configuration.tangents:
        mask_t = torch.empty_like(mask)
    if dropout:
        seed = torch.empty((), dtype=torch.int64, device=META)
    options = (configuration.causal, 0.125, 0.5 if dropout else 0.0)
    of: Any = kernels if of_partial is None else of_partial.functions
    seen: tuple[Any, ...] = of_partial.pattern if of_partial is not None else (None, True) if high else ()
    if configuration.tangents:
        o, o_t, lse, mu = of.forward_jvp(q, k, v, q_t, k_t, v_t, mask, mask_t, seed, *options, *seen)
        given, wanted = (q, k, v, q_t, k_t, v_t, o, o_t, lse, mu), (*(True,) * 6, learned, learned)
        of.backward_jvp(d_o, d_o, *given, mask, mask_t, seed, *options, wanted, *seen)
    else:
        o, lse = of.forward(q, k, v, mask, seed, *options, *seen)
        of.backward(d_o, q, k, v, o, lse, mask, seed, *options, (*(True,) * 3, learned), *seen)


class _OfPartial(NamedTuple):
    """Functions with kernels of their own, what comes in the mask's place, and the pattern that they are given."""

    functions: Any
    in_place_of_mask: Tensor | None
    pattern: tuple[Band | Listed, ...] = ()


def _partial(mask: str) -> _OfPartial | None:
    """What PARTIAL calls so; None for another mask."""
    if mask not in PARTIAL:
        return None
    if mask == "window":
        return _OfPartial(kernels, None, (Band(-512, 512),))
    if mask == "blocks":
        return _OfPartial(kernels, torch.empty(1 << 16, dtype=torch.int32, device=META), (Listed(),))
    return _OfPartial(triton_varlen, torch.empty(2, 8, dtype=torch.int32, device=META))


def measure(compiled: Any) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of a compiled kernel."""
    version, target = re.findall(r"^\.(?:version|target) (\S+)", compiled.asm["ptx"], re.MULTILINE)[:2]
    isa = f"{target.rstrip(',')}, PTX {version}"
    found = {**of_sass(dump(compiled.asm["cubin"])), "isa": isa, "shared_bytes": compiled.metadata.shared}
    if lost := handed_on(compiled.asm["source"]):
        found["failure"] = found["failure"] or f"a loop hands numbers on, which Triton 3.6 and 3.7 lose: {lost}"
    return found


def dump(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def of_sass(text: str) -> dict[str, Any]:
    """What cuobjdump says of a kernel; local memory is what ptxas spills registers to."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:500]
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE)
    code = [(f"0x{int(address, 16):x}", instruction) for address, instruction in lines]
    ends = [place for place, (_, instruction) in enumerate(code) if re.search(r"\bEXIT\b", instruction)]
    loops = code[: ends[-1] + 1] if ends else code  # behind the last end, waits that are seldom entered jump back
    # Warp-specialised kernels have loops that only wait or copy.
    spills, share = in_loops(loops, SASS_BRANCH, r"\b(?:LDL|STL)\b", r"\bHGMMA\b" if "USETMAXREG" in text else "")
    return {
        "registers": int(usage[1]),
        "spill_bytes": int(usage[2]),
        "loop_spills": spills,
        "loop_spill_share": share,
        "tensor_core": count(code, r"\b(?:HGMMA|HMMA|QGMMA|UTC[A-Z]*MMA)\b"),
        "failure": _failure(loops),
    }


def _failure(code: Code) -> str:
    if count(code, r"\bBPT\.TRAP\b"):
        return "nothing but a trap: on sm_100, more tensor memory than there is"
    return "a loop overwrites an operand that it is to keep in registers" if overwritten(code) else ""


def overwritten(code: Code) -> list[str]:
    """Products whose left operand, in registers, comes from before an innermost loop that writes to these registers.

    ptxas 12.8 compiles that from correct PTX where a register operand takes part in one product: from the second
    iteration on, the product is wrong. Our operands stay in registers all the time or are made in the same iteration.
    """
    found = []
    for first, last in innermost_loops(code, SASS_BRANCH):
        written: set[int] = set()
        kept: list[tuple[str, set[int]]] = []
        for _, instruction in code[first : last + 1]:
            if left := re.search(r"\bHGMMA\S* R\d+, R(\d+), gdesc", instruction):
                registers = set(range(int(left[1]), int(left[1]) + 4))
                if not registers & written:
                    kept.append((instruction, registers))
            written |= _destinations(instruction)
        found += [instruction for instruction, registers in kept if registers & written]
    return found


def _destinations(instruction: str) -> set[int]:
    """The registers that an instruction writes, products aside: their accumulators are no operands of ours."""
    parts = re.match(r"(?:@!?U?P\d+ )?(\S+) (?:P\d+, )?R(\d+)\b", instruction)
    if parts is None or parts[1].startswith(("ST", "HGMMA", "RED", "R2UR", "SYNCS", "WARPGROUP")):
        return set()
    wide = {"CS2R": 2, "LDSM": 4}.get(parts[1].split(".")[0], 1)
    width = 4 if ".128" in parts[1] else 2 if ".64" in parts[1] or ".WIDE" in parts[1] else wide
    return set(range(int(parts[2]), int(parts[2]) + width))


def in_loops(code: Code, branch: str, spill: str, essential: str = "") -> tuple[int, float]:
    """Instructions that match `spill`, in innermost loops that have one like `essential`, and their largest share."""
    inner = [loop for loop in innermost_loops(code, branch) if count(code[loop[0] : loop[1] + 1], essential)]
    counts = [(count(code[first : last + 1], spill), last + 1 - first) for first, last in inner]
    return sum(spills for spills, _ in counts), max((spills / size for spills, size in counts), default=0.0)


def innermost_loops(code: Code, branch: str) -> list[tuple[int, int]]:
    """First and last place of each loop without a loop in it.

    `code` is (name, instruction) in order; `branch` matches a branch, its group the name of the target.
    """
    places = {name: place for place, (name, _) in enumerate(code) if name}
    loops = []
    for place, (_, instruction) in enumerate(code):
        found = re.search(branch, instruction)
        if found and places.get(found[1], place) < place:
            loops.append((places[found[1]], place))
    return [
        loop for loop in loops if not any(loop != x and loop[0] <= x[0] and x[1] <= loop[1] for x in loops)
    ]  # fmt: skip


def count(code: Code, pattern: str) -> int:
    return sum(re.search(pattern, instruction) is not None for _, instruction in code)


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        print(json.dumps([asdict(kernel) for kernel in compile_all(Configuration(**job))]), flush=True)
