"""`torchrun --nproc-per-node 2 -m bench.ring`: one sequence on several GPUs, against one GPU; a CSV row for each.

Every process first times the whole sequence on its own device, then its part of it. The slowest process counts. Before
a preset's shape is timed, the same way of dividing is compared with one process at a short length, within the error
budget.

With --plan nothing is run: it prints bytes and efficiencies that follow from the rates given (ring_plan.py).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

import flashjvp
from flashjvp import distributed
from flashjvp.distributed import Sharding
from flashjvp_commands import arguments as types
from flashjvp_commands import ending, outputs
from flashjvp_commands.entry import program
from reports.environment import commit, machine, version
from reports.schema import write_rows
from tvm_ref.training.parallel import World, leave, world
from verify.budget import tolerance
from verify.cases.inputs import Inputs
from verify.oracles.attention import Results, dense64, dense_same_type

from . import ring_plan
from .cases import Case, make_inputs, operations

HOW = ("ring", "zigzag", "ulysses")
WARM_UP, REPEATS, CHECKED_LENGTH = 3, 10, 500
PRESETS = {
    "ring": [(1, 24, 32768, 128), (1, 18, 32768, 64), (1, 24, 8192, 128)],
    "quick": [(1, 2, 256, 32)],
}
"""Batch, heads, tokens and head dim; each without a mask as a ring and by Ulysses, and causal as a zig-zag."""
KEYS = (False, True, True) * 2  # which of q, k, v and their tangents have the rows of keys


@dataclass(frozen=True, kw_only=True)
class RingRow:
    """One way of dividing one shape: medians of the slowest process, and one_ms / (gpus * ms) as efficiency."""

    how: str
    mode: str
    gpus: int
    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    causal: bool
    one_ms: float
    ms: float
    efficiency: float
    tflops_of_each: float
    machine: str
    torch_version: str
    triton_version: str
    commit: str


RING_COLUMNS = tuple(field.name for field in fields(RingRow))


def plan(preset: str, dtype: str, ways: Sequence[str] = HOW) -> Iterator[tuple[str, Case]]:
    """Ways of dividing, and what is divided."""
    for batch, heads, tokens, head_dim in PRESETS[preset]:
        for how in ways:
            for mode in ("fwd", "bwd", "fwd+bwd"):
                yield how, Case(
                    mode=mode, batch=batch, heads=heads, kv_heads=heads, queries=tokens, keys=tokens, head_dim=head_dim,
                    dtype=dtype, causal=how == "zigzag",
                )  # fmt: skip


def sharding_of(how: str, tokens: int) -> Sharding:
    """All processes in one ring, or in one exchange."""
    group = dist.group.WORLD if dist.is_initialized() else None
    if how == "ulysses":
        return Sharding(tokens, ulysses=group)
    return Sharding(tokens, ring=group, zigzag=how == "zigzag")


class Call:
    """A call of attention with its JVP, of the whole sequence or of this process's part, in one mode."""

    def __init__(self, inputs: Inputs, mode: str, sharding: Sharding | None) -> None:
        whole = [inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t]
        self._sharding, self._mode, self._causal = sharding, mode, inputs.is_causal
        cotangents = [x for x in (inputs.d_o, inputs.d_o_t) if x is not None]
        self._leaves = [self._part(x, keys).requires_grad_(mode != "fwd") for x, keys in zip(whole, KEYS, strict=True)]
        self._cotangents = [self._part(x, False) for x in cotangents]
        self._outputs: Any = self.forward() if mode == "bwd" else None

    def _part(self, x: Any, keys: bool) -> Tensor:
        part: Tensor = x if self._sharding is None else self._sharding.shard(x, -2, keys)
        return part.detach().clone()

    def forward(self) -> tuple[Tensor, Tensor]:
        q, k, v, q_t, k_t, v_t = self._leaves
        if self._sharding is None:
            return flashjvp.attention_jvp(q, k, v, q_t, k_t, v_t, is_causal=self._causal)
        return distributed.attention_jvp(q, k, v, q_t, k_t, v_t, self._sharding, is_causal=self._causal)

    def gradients(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self._leaves, self._cotangents, retain_graph=self._mode == "bwd")

    def run(self) -> None:
        """What is timed."""
        if self._mode == "fwd":
            self.forward()
        else:
            self.gradients(self._outputs if self._mode == "bwd" else self.forward())


def milliseconds(run: Callable[[], None], this: World) -> float:
    """The median over repeats of the slowest process's time."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        if this.size > 1:
            dist.barrier()
        _wait(this)
        began = time.perf_counter()
        run()
        _wait(this)
        times.append(max(this.gather(time.perf_counter() - began)))
    return 1e3 * statistics.median(times[WARM_UP:])


def _wait(this: World) -> None:
    if this.device.type == "cuda":
        torch.cuda.synchronize()


def check(how: str, case: Case, this: World) -> None:
    """Raises AssertionError where results at a short length are outside of the error budget."""
    short = replace(case, queries=CHECKED_LENGTH, keys=CHECKED_LENGTH, heads=2, kv_heads=2, mode="fwd+bwd")
    inputs = make_inputs(short, this.device)
    sharding = sharding_of(how, CHECKED_LENGTH)
    call = Call(inputs, short.mode, sharding)
    outputs_ = call.forward()
    found = [*outputs_, *call.gradients(outputs_)]
    whole = [sharding.unshard(x.detach(), -2, keys) for x, keys in zip(found, (False, False, *KEYS), strict=True)]
    exact = dense64(inputs)
    verdicts = tolerance.check(Results(*whole), exact, tolerance.budget(inputs, exact, dense_same_type(inputs)))
    assert all(verdict.ok for verdict in verdicts), f"{how}: {[verdict for verdict in verdicts if not verdict.ok]}"


def measured(how: str, case: Case, this: World) -> RingRow:
    """Times the whole on each process, then their parts together."""
    inputs = make_inputs(case, this.device)
    one = milliseconds(Call(inputs, case.mode, None).run, this)
    call = Call(inputs, case.mode, sharding_of(how, case.queries))
    del inputs
    ms = milliseconds(call.run, this)
    return RingRow(
        how=how, mode=case.mode, gpus=this.size, batch=case.batch, heads=case.heads, tokens=case.queries,
        head_dim=case.head_dim, dtype=case.dtype, causal=case.causal, one_ms=one, ms=ms,
        efficiency=one / (this.size * ms), tflops_of_each=operations(case) / (this.size * ms * 1e9),
        machine=machine(this.device), torch_version=torch.__version__, triton_version=version("triton"),
        commit=commit(),
    )  # fmt: skip


def planned(options: argparse.Namespace) -> str:
    """A line for each number of GPUs, as Markdown: gigabytes that a GPU sends, and efficiency."""
    forward, backward, link, memory = options.rates
    rates = ring_plan.Rates(forward * 1e12, backward * 1e12, link * 1e9, memory * 1e9)
    shape = (options.heads, options.head_dim, rates)
    lines = [
        "| tokens | GPUs | ring, forward | ring, backward | Ulysses, forward | Ulysses, backward |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in options.tokens:
        for gpus in options.gpus:
            plans = [
                make(mode, tokens, gpus, *shape)
                for make in (ring_plan.ring, ring_plan.ulysses)
                for mode in ("fwd", "bwd")
            ]
            cells = [f"{100 * x.efficiency:.0f} %, {x.sent_bytes / 1e9:.2f} GB" for x in plans]
            lines.append(" | ".join([f"| {tokens}", str(gpus), *cells]) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    found = types.parser(program("bench.ring"), description, epilog)
    found.add_argument("--preset", choices=PRESETS, default="ring", help="the shapes (ring)")
    found.add_argument(
        "--how", type=types.names_out_of(HOW), default=HOW, metavar="NAME,...", help=f"out of {', '.join(HOW)} (all)"
    )
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    found.add_argument(
        "--out", type=outputs.path_with(".csv"), metavar="PATH",
        help=f"for the rows, written as they come: {outputs.HELP % '.csv'}; without it they are only printed",
    )  # fmt: skip
    found.add_argument("--plan", action="store_true", help="run nothing, print what the rates below give")
    found.add_argument("--tokens", type=types.wholes(1), default=[32768, 131072], metavar="LIST", help="(32768,131072)")
    found.add_argument("--gpus", type=types.wholes(1), default=[2, 4, 8], metavar="LIST", help="(2,4,8)")
    found.add_argument("--heads", type=types.whole(1), default=24, metavar="N", help="(24)")
    found.add_argument("--head-dim", type=types.whole(1), default=128, metavar="N", help="(128)")
    found.add_argument(
        "--rates", type=types.wholes(1), default=[652, 469, 450, 4264], metavar="LIST",
        help="TFLOP/s forward and backward, GB/s to other GPUs and of memory (652,469,450,4264)",
    )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all shapes were timed, or the plan was printed."""
    given, console = parser(), Console()
    options = given.parse_args(arguments)
    if len(options.rates) != 4:
        given.error(f"--rates: expected four numbers, got {len(options.rates)}")
    if options.plan:
        print(planned(options))
        return 0
    try:
        recognise = outputs.has_columns(RING_COLUMNS)
        path = options.out and outputs.prepared(options.out, "ring.csv", (".csv",), recognise)
    except outputs.OutputError as error:
        given.error(f"--out: {error}")
    rows: list[RingRow] = []
    with world(options.device) as this:
        dtype = "bfloat16" if this.device.type == "cuda" else "float32"
        for how, case in plan(options.preset, dtype, options.how):
            if case.mode == "fwd":
                check(how, case, this)
            rows.append(measured(how, case, this))
            if not this.first:
                continue
            if path:
                write_rows(path, rows, RING_COLUMNS)
            x = rows[-1]
            console.print(
                f"{how} {x.mode} {x.batch}, {x.heads}, {x.tokens}, {x.head_dim}: one {x.one_ms:.3f} ms, {x.gpus} "
                f"{x.ms:.3f} ms, efficiency {x.efficiency:.3f}", highlight=False, soft_wrap=True,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    leave(ending.run(main))
