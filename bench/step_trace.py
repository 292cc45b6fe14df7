"""Where the time of a traced training step goes, by group: reads what torch.profiler exports as a Chrome trace.

On a GPU the pieces of a step are its kernels and copies. On a CPU they are the operators, each without those that it
calls. A piece belongs to the operator that launched it and, with that, to what encloses the operator.
"""

import bisect
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

IDLE = "idle"
GROUPS = (
    "products", "attention", "elementwise forward", "elementwise backward", "optimizer", "communication", IDLE,
)  # fmt: skip
STEP = "a training step"  # the annotation around each step
OPTIMIZER = "optimizer and averages"  # the annotation around what follows the gradient; PATTERNS has it, too
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
BACKWARD = "autograd::engine::evaluate_function"
# Names of kernels and operators. The first pattern that fits decides, so the order counts.
PATTERNS = (
    ("communication", r"nccl|gloo|c10d::|_c10d_functional|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"flashjvp::"),
    ("products", r"aten::(mm|addmm|_scaled_mm|bmm|baddbmm|mv|dot|_addmm_activation)\b|gemm|nvjet|cutlass|xmma|cublas"),
    (
        "optimizer",
        r"_fused_adam|_foreach_(norm|lerp)|multi_tensor_apply|lpnorm|adamw_and_averages|^optimizer and averages$",
    ),
)
ORDER = (*(group for group, _ in PATTERNS), "elementwise backward", "elementwise forward")
VIEWS = re.compile(
    r"aten::(as_strided|_?(unsafe_)?view|_reshape_alias|t|transpose|permute|expand|detach|alias|select|slice|"
    r"unsqueeze|squeeze|unflatten|empty\w*|resolve_\w+|narrow|split\w*|chunk|unbind|lift_fresh|set_|resize_|result_type"
    r"|item|_local_scalar_dense|record_stream)$|detach$"
)  # fmt: skip
BYTES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "bool": 1, "signed char": 1,
    "unsigned char": 1, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1,
}  # fmt: skip
# Where the left factor of a matrix product stands among the operands; the right one follows, then a tensor to write to.
LEFT_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_scaled_mm": 0}
# Of a pass over heads of q [.., N, D] and k [.., M, D], in units of N M D: as flashjvp/kernels/MATH.md counts.
ATTENTION_FLOPS = {"forward": 4, "forward_jvp": 12, "backward": 10, "backward_jvp": 30}


@dataclass(frozen=True)
class Group:
    """What one group takes of a step, a mean over the traced steps.

    ms: of the step's time. Where kernels run side by side, an instant counts once, and as communication only where
        nothing else runs, so all groups with idle add up to the step.
    busy_ms: the durations of all its kernels.
    gib: read and written, each operand of a kernel counted once, in GiB; 0 for what has no recorded operands.
    tflop: of matrix products and attention, in 10^12 operations; in float8, which has twice the rate, half of them.
    kernels: how many.
    """

    group: str
    ms: float
    busy_ms: float
    gib: float
    tflop: float
    kernels: float

    def floor_ms(self, tbytes_per_s: float, tflops: float) -> float:
        """The time that bytes or products take at least at these rates, in ms; NaN for communication."""
        if self.group == "communication":
            return math.nan
        return max(self.gib * 2**30 / (tbytes_per_s * 1e9), 1e3 * self.tflop / tflops)


@dataclass(frozen=True)
class _Piece:
    name: str
    start: float
    end: float
    names: tuple[str, ...]  # of the operators and annotations around it, the innermost first
    gib: float = 0.0
    tflop: float = 0.0


def groups(trace: Any) -> list[Group]:
    """The groups of a Chrome trace, in the order of GROUPS. Raises ValueError if no step is marked in it."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["name"] == STEP and event.get("cat") == "user_annotation"
    ]
    if not steps:
        raise ValueError(f"trace: expected a step, annotated as {STEP!r}, got none")
    pieces = list(_device_pieces(events) if any(e.get("cat") in DEVICE for e in events) else _host_pieces(events))
    found: dict[str, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        if any(start <= piece.start < end for start, end in steps):
            found[group_of(piece.name, piece.names)].append(piece)
    others = [piece for name, of in found.items() if name != "communication" for piece in of]
    own: dict[str, float] = defaultdict(float)
    reached = -math.inf
    for piece in sorted(others, key=lambda piece: piece.start):
        own[group_of(piece.name, piece.names)] += max(0.0, piece.end - max(piece.start, reached))
        reached = max(reached, piece.end)
    computing = sum(own.values())
    busy = _union(others + found["communication"])
    own["communication"] = busy - computing
    own[IDLE] = max(0.0, sum(end - start for start, end in steps) - busy)
    scale = 1e-3 / len(steps)
    return [
        Group(
            name, own[name] * scale, sum(piece.end - piece.start for piece in found[name]) * scale,
            sum(piece.gib for piece in found[name]) / len(steps),
            sum(piece.tflop for piece in found[name]) / len(steps), len(found[name]) / len(steps),
        )
        for name in GROUPS
    ]  # fmt: skip


def group_of(name: str, names: Iterable[str]) -> str:
    """The group of a kernel or operator, inside of operators and annotations called `names`."""
    return ORDER[min(map(_place_of, (name, *names)))]


@functools.cache
def _place_of(name: str) -> int:
    """Where a name stands in ORDER by itself."""
    for place, (_, pattern) in enumerate(PATTERNS):
        if re.search(pattern, name, re.IGNORECASE):
            return place
    return len(PATTERNS) if name.startswith(BACKWARD) else len(PATTERNS) + 1


@functools.cache
def _is_view(name: str) -> bool:
    return VIEWS.search(name) is not None


def _device_pieces(events: list[Any]) -> Iterator[_Piece]:
    """The kernels and copies of a GPU. Of several kernels of one operator, the first one carries its operands."""
    operators = {event["args"]["External id"]: (event, names) for event, names in _nested(events)}
    counted = set()
    for event in sorted(events, key=lambda event: event["ts"]):
        if event.get("cat") not in DEVICE:
            continue
        identity = event.get("args", {}).get("External id")
        operator, names = operators.get(identity, (None, ()))
        gib, tflop = (0.0, 0.0) if operator is None or identity in counted else work_of(operator)
        counted.add(identity)
        around = names if operator is None else (operator["name"], *names)
        yield _Piece(event["name"], event["ts"], event["ts"] + event["dur"], around, gib, tflop)


def _host_pieces(events: list[Any]) -> Iterator[_Piece]:
    """The operators of a CPU, without the time of those that they call. Only what calls nothing carries operands."""
    inside = defaultdict(list)
    nested = list(_nested(events))
    for event, _ in nested:
        inside[event["tid"]].append(event)
    for event, names in nested:
        if event.get("cat") != "cpu_op" or event["name"].startswith(BACKWARD):
            continue
        start, end = event["ts"], event["ts"] + event["dur"]
        row = inside[event["tid"]]
        place = bisect.bisect_right(row, (start, -event["dur"]), key=lambda each: (each["ts"], -each["dur"]))
        reached, calls = start, False
        for other in row[place:]:
            if other["ts"] >= end:
                break
            if other["ts"] >= reached:
                if other["ts"] > reached:
                    yield _Piece(event["name"], reached, other["ts"], names)
                reached = min(end, other["ts"] + other["dur"])
            calls = calls or not _is_view(other["name"])
        yield _Piece(event["name"], reached, end, names, *((0.0, 0.0) if calls else work_of(event)))


def _nested(events: list[Any]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Operators and annotations of the host, each with the names of those around it, the innermost first."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    for of in threads.values():
        stack: list[Any] = []
        for event in sorted(of, key=lambda event: (event["ts"], -event["dur"])):
            while stack and event["ts"] >= stack[-1]["ts"] + stack[-1]["dur"]:
                stack.pop()
            yield event, tuple(each["name"] for each in reversed(stack))
            stack.append(event)


def work_of(operator: Any) -> tuple[float, float]:
    """GiB that an operator moves and its TFLOP of products, from the shapes and types that the profiler recorded."""
    name, arguments = operator["name"], operator.get("args", {})
    dims, types = arguments.get("Input Dims", []), arguments.get("Input type", [])
    if _is_view(name) or not dims:
        return 0.0, 0.0
    sizes = [_bytes(of, kind) for of, kind in zip(dims, types, strict=False)]
    shapes = [of for of in dims if of and not isinstance(of[0], list)]
    kind = name.partition("::")[2]
    written, flops = 0.0, 0.0
    if kind in LEFT_FACTOR:
        left, right, *out = shapes[LEFT_FACTOR[kind] :]
        flops = (1.0 if kind == "_scaled_mm" else 2.0) * math.prod(left) * right[-1]
        if not out:  # inductor gives the tensor that is written, and then it is among the operands
            first = next(kind for kind in types if kind in BYTES)
            written = math.prod(left[:-1]) * right[-1] * BYTES[first]
    elif name.startswith("flashjvp::") and kind in ATTENTION_FLOPS:
        q, k = shapes[:2]
        flops = float(ATTENTION_FLOPS[kind] * math.prod(q) * k[-2])
        written = sizes[0] * (2 if kind == "forward_jvp" else 1)
    elif "::" in name and sizes:  # kernels of inductor have their results among their arguments
        written = sizes[0] if name.endswith("_") else max(sizes)
    return (sum(sizes) + written) / 2**30, flops / 1e12


def _bytes(dims: Any, kind: str) -> float:
    """The bytes of an argument; lists of tensors have no recorded type, and count as float32."""
    if dims and isinstance(dims[0], list):
        return sum(4.0 * math.prod(each) for each in dims)
    return float(math.prod(dims) * BYTES[kind]) if kind in BYTES else 0.0


def _union(pieces: Iterable[_Piece]) -> float:
    total, reached = 0.0, -math.inf
    for piece in sorted(pieces, key=lambda piece: piece.start):
        total += max(0.0, piece.end - max(piece.start, reached))
        reached = max(reached, piece.end)
    return total
