"""Compiles the kernels for every supported architecture, without a GPU, and shows what came out: registers, spills,
shared memory, tensor-core instructions and instruction set.

A kernel fails if it does not compile, if the compiler gives up and leaves a trap in its place, or if it wants more
shared memory than a block of the architecture has. On sm_90 it also fails if its inner loops touch spilled registers
(local memory), with any Triton: not at all in the default configuration of each head dim and type, in PyTorch's
deterministic mode neither, and in at most OPTION_SPILLS of a loop's instructions with a mask, causal or grouped, where
the few tiles that need less were measured to be slower. FASTER_SPILLS names tiles that spill and are faster than any
that do not, KNOWN_SPILLS what is left with one release of Triton. On the other architectures, whose tiles nobody timed,
UNMEASURED_SPILLS are the most. Spills outside of the loops cost nothing and are only shown, like those of rows that do
not start at multiples of 16 bytes, which are slow whatever the tile.

By default a sample is compiled, with --all the full product of head dims, types and options (configuration.py), with
--of-sample so many of the sample, others at each commit.
Triton's cache is used where TRITON_CACHE_DIR says; without it, the cache is temporary.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.markup import escape
from rich.table import Table

from flashjvp.kernels.launch.schedule import padded_width
from flashjvp_commands import arguments as types
from flashjvp_commands import children, outputs, terminal
from flashjvp_commands.ending import stopped_status
from flashjvp_commands.entry import program
from reports.environment import commit
from reports.schema import write_rows

from .configuration import ADDITIVE, COLUMNS, PARTIAL, Configuration, Kernel, product, sample

ROOT = Path(__file__).resolve().parents[2]
# architecture -> bytes of shared memory that a block may have
SHARED_BYTES = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376,
}  # fmt: skip
OPTION_SPILLS = 1 / 128
# With learned masks, dropout, windows and blocks, whose tiles are those of calls without them: 1.5 % was found, and no
# tile tuned yet.
UNTUNED_SPILLS = 1 / 50
# With additive masks, likewise: the most is in loops over tiles that are masked by position, too, of which there are
# few. Loops over whole tiles have at most a half of that.
ADDITIVE_SPILLS = 1 / 8
UNMEASURED_SPILLS = 1 / 32
# (input precision, padded head dim, family) -> spills of tiles that were measured to be faster than any without: on an
# H200 the forward of 2,16,4096,160 in bfloat16 takes 3.56 ms, without spills 5.3, and d_v and d_v_t 5 ms less.
FASTER_SPILLS = {("half", width, family): 1 / 12 for width in (160, 192) for family in ("forward", "backward_value")}
# release of Triton -> (input precision, largest head dim, as it is or padded, family) -> the most that was found
KNOWN_SPILLS = {
    "3.7": {("half", 64, "backward_key_value"): 1 / 64, ("ieee", 256, "backward_value"): 1 / 256},
    "3.8": {
        ("half", 64, "backward_key_value"): 1 / 64,
        ("tf32", 256, "forward"): 1 / 64,
        ("tf32", 256, "backward_query"): 1 / 6,
        ("tf32", 256, "backward_value"): 1 / 8,
        ("tf32", 256, "backward_key"): 1 / 256,
        ("ieee", 256, "backward_value"): 1 / 256,
    },
    "3.9": {
        ("half", 64, "forward"): 1 / 256,
        ("half", 64, "backward_key"): 1 / 128,
        ("half", 64, "partial_backward_key"): 1 / 256,  # the same kernel under a block mask
        ("half", 64, "backward_query"): 1 / 32,  # with dropout
        ("half", 96, "backward_value"): 1 / 128,
        ("half", 128, "backward_value"): 1 / 128,
        ("half", 256, "backward_query"): 1 / 32,
        ("half", 256, "backward_value"): 1 / 256,
        ("tf32", 64, "backward_key"): 1 / 16,
        ("tf32", 96, "backward_value"): 1 / 128,
        ("tf32", 128, "backward_value"): 1 / 256,
        ("tf32", 160, "backward_query"): 1 / 256,
        ("tf32", 160, "backward_key"): 1 / 256,
        ("tf32", 192, "backward_query"): 1 / 256,
        ("tf32", 256, "backward_query"): 1 / 256,
        ("tf32", 256, "backward_value"): 1 / 256,
        ("tf32", 256, "backward_key"): 1 / 256,
        ("ieee", 192, "backward_query"): 1 / 256,
        ("ieee", 192, "backward_value"): 1 / 256,
        ("ieee", 64, "forward"): 1 / 128,
        ("ieee", 64, "backward_key"): 1 / 64,
        ("ieee", 256, "backward_query"): 1 / 256,
        ("half", 64, "partial_backward_query"): 1 / 32,
        ("half", 128, "partial_forward"): 1 / 12,
        ("half", 128, "partial_backward_query"): 1 / 32,
        ("half", 128, "partial_backward_key"): 1 / 32,
        ("half", 128, "partial_backward_pairs"): 1 / 32,
        ("half", 96, "backward_one_pass"): 1 / 256,
    },
}
PROCESSES = len(os.sched_getaffinity(0))


def compiled(configurations: Sequence[Configuration]) -> Generator[list[Kernel]]:
    """The kernels of each configuration, as they come, compiled in PROCESSES processes (worker.py).

    A compiler that aborts takes its process along: that is a failing row, and another process goes on.
    """
    answers: SimpleQueue[list[Kernel] | None] = SimpleQueue()
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(PROCESSES) as threads:

        def serve(jobs: Sequence[Configuration]) -> None:
            try:
                while jobs and not ended:
                    done, why = _compile_in_process(jobs, cache, answers)
                    if why:
                        answers.put([Kernel(**asdict(jobs[done]), failure=why)])
                    jobs = jobs[done + 1 :] if why else ()
            finally:
                answers.put(None)

        ended: list[bool] = []
        servers = [threads.submit(serve, configurations[start::PROCESSES]) for start in range(PROCESSES)]
        try:
            for _ in servers:
                yield from iter(answers.get, None)
        except BaseException:
            ended.append(True)  # no compiler is started any more, and none goes on
            children.end_all()
            raise
        for server in servers:
            server.result()


def _compile_in_process(
    jobs: Sequence[Configuration], cache: str, answers: SimpleQueue[list[Kernel] | None]
) -> tuple[int, str]:
    """How many jobs a process answered, and why it ended before it had answered all, if it did."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", cache)
    command, pipe = [sys.executable, "-m", "verify.codegen.worker"], subprocess.PIPE
    with tempfile.TemporaryFile("w+") as errors:
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stderr": errors, "text": True}
        with children.child(command, stdin=pipe, stdout=pipe, **options) as server:
            assert server.stdin is not None and server.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: the loop below finds nothing
                json.dump([asdict(job) for job in jobs], server.stdin)
                server.stdin.close()
            done = 0
            for line in server.stdout:
                answers.put([Kernel(**kernel) for kernel in json.loads(line)])
                done += 1
            server.wait()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    if done == len(jobs):
        return done, ""
    return done, f"exit code {server.returncode}: {said[-1][:300] if said else 'nothing said'}"


def unusable(kernel: Kernel) -> str:
    """Why a kernel cannot run, or an empty string."""
    if kernel.failure:
        return kernel.failure
    if kernel.shared_bytes > SHARED_BYTES[kernel.architecture]:
        return f"shared memory: at most {SHARED_BYTES[kernel.architecture]} bytes"
    return ""


def fault(kernel: Kernel, triton_version: str) -> str:
    """Why a kernel fails, or an empty string."""
    if reason := unusable(kernel):
        return reason
    default = not (kernel.causal or kernel.mask or kernel.group > 1)
    if kernel.architecture != "sm_90":
        return _of_spills(kernel, UNMEASURED_SPILLS)
    known = KNOWN_SPILLS.get(".".join(triton_version.split(".")[:2]), {})
    family = kernel.family.split(",")[0]
    width = max(kernel.d, kernel.dv)
    columns = padded_width(width)
    kind = "tf32" if kernel.kind == "high" else kernel.kind  # but for the type of gradients, the same kernels
    allowed = max(known.get((kind, x, family), 0.0) for x in (width, columns))
    allowed = max(allowed, FASTER_SPILLS.get((kind, columns, family.removeprefix("partial_")), 0.0))
    options = UNTUNED_SPILLS if kernel.mask in ("learned", "dropout", *PARTIAL) else OPTION_SPILLS
    options = ADDITIVE_SPILLS if kernel.mask in ADDITIVE else options
    allowed = allowed if default else max(allowed, options)
    return _of_spills(kernel, allowed)


def _of_spills(kernel: Kernel, allowed: float) -> str:
    aligned = all(width * (2 if kernel.kind in ("half", "high") else 4) % 16 == 0 for width in (kernel.d, kernel.dv))
    if aligned and kernel.loop_spill_share > allowed:
        return f"spills: {kernel.loop_spill_share:.1%} of a loop's instructions, at most {allowed:.1%}"
    return ""


def options_of(kernel: Kernel) -> str:
    """The options of a kernel's configuration in words."""
    words = [f"JVP of {kernel.tangents}" if kernel.tangents else "plain"]
    words += ["causal"] * kernel.causal + [f"{kernel.mask} mask"] * bool(kernel.mask)
    words += [f"{kernel.group} query heads a key head"] * (kernel.group > 1) + ["deterministic"] * kernel.ordered
    words += ["short"] * kernel.short
    return ", ".join(words)


def table(kernels: Sequence[Kernel], triton_version: str) -> Table:
    """One row for each kernel."""
    out = Table(title=f"kernels compiled by Triton {triton_version}")
    for column in ("kernel", "products", "D, Dv", "verdict", "options", "tile", "target"):
        out.add_column(column)
    for column in ("registers", "spill B", "in loops", "shared B", "tensor-core"):
        out.add_column(column, justify="right")
    for k in kernels:
        reason = fault(k, triton_version)
        verdict = f"[red]{escape(reason)}" if reason else "[green]ok"
        numbers = map(str, (k.registers, k.spill_bytes, k.loop_spills, k.shared_bytes, k.tensor_core))
        what = (k.family, k.kind, f"{k.d}, {k.dv}", verdict, options_of(k), k.tile, k.isa or k.architecture)
        out.add_row(*what, *numbers)
    return out


def run(options: argparse.Namespace, out: Path | None) -> int:
    """0 if no kernel fails; 128 plus the number of the signal that stopped it."""
    import triton

    choose = product if options.all else sample
    plan = [configuration for architecture in options.arch for configuration in choose(architecture)]
    if options.of_sample:
        plan = random.Random(commit()).sample(plan, min(options.of_sample, len(plan)))
    console = terminal.console()
    found: list[list[Kernel]] = []
    stop = None
    try:
        with terminal.Bar(console, "configurations", len(plan)) as bar, contextlib.closing(compiled(plan)) as several:
            for kernels in several:
                found.append(kernels)
                bar.advance_by(1)
    except KeyboardInterrupt as signalled:
        stop, out = signalled, out and outputs.stopped_name(out)
        console.print(f"stopped after {len(found)} of {len(plan)} configurations")
    place = {configuration: index for index, configuration in enumerate(plan)}
    names = [field.name for field in fields(Configuration)]
    rows = [kernel for several in found for kernel in several]
    rows.sort(key=lambda kernel: place[Configuration(**{name: getattr(kernel, name) for name in names})])
    console.print(terminal.Fitted(table(rows, triton.__version__), names=3))
    if out is not None and rows:
        write_rows(out, rows, COLUMNS)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    failed = sum(fault(kernel, triton.__version__) != "" for kernel in rows)
    what = "all configurations" if options.all else "a sample (every head dim and input precision, each option once)"
    console.print(f"{len(rows)} kernels of {what} for {', '.join(options.arch)}: {failed} failed")
    return stopped_status(stop) if stop else 1 if failed or not rows else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = types.parser(f"{program('verify')} codegen", (__doc__ or "").split("\n\n")[0])
    known = list(SHARED_BYTES)
    parser.add_argument(
        "--arch", type=types.names_out_of(known), default=known, metavar="NAME,...",
        help=f"targets, out of {', '.join(known)} (all)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every combination, not the sample (hours)")
    parser.add_argument(
        "--of-sample", type=types.whole(1), metavar="N", help="so many of the sample, chosen by the commit's hash"
    )
    out_help = f"for the rows: {outputs.HELP % '.csv'}"
    parser.add_argument("--out", type=outputs.path_with(".csv"), metavar="PATH", help=out_help)
    options = parser.parse_args(arguments)
    try:
        out = options.out and outputs.prepared(options.out, "codegen.csv", (".csv",), outputs.has_columns(COLUMNS))
    except outputs.OutputError as error:
        parser.error(f"--out: {error}")
    return run(options, out)
