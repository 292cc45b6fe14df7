"""`python -m bench.interleaved`: interleaved timing of attention and a large matrix product; a CSV row for each call.

A card under load lowers its clocks, and a sweep measures its ceiling before the card is warm. Here each call is timed
between two products, so that both meet the same clocks: `of_ceiling` is the rate of the call over that of the products
before and after it. Shapes are those that docs/performance.md judges the kernels by. Results are not judged here:
`python -m verify` does that.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from flashjvp_commands import arguments as types
from flashjvp_commands import ending, outputs, terminal
from flashjvp_commands.entry import program
from reports.environment import commit, machine, version
from reports.interleaved import INTERLEAVED_COLUMNS, InterleavedTiming, call_name
from reports.schema import write_rows

from .cases import DTYPES, Case, make_inputs, operations, require_gradients
from .environment import CEILING_SIZE
from .measure import Work, latency, work
from .providers import PROVIDERS

ROUNDS = 2
SHAPES = (
    (1, 24, 8192, 128),
    (1, 24, 8192, 64),
    (32, 18, 1024, 64),
    (64, 18, 256, 64),
    (1, 24, 1024, 128),
    (8, 16, 4096, 64),
    (8, 16, 4096, 72),
)
TF32 = (1, 24, 4096, 128)


def plan() -> Iterator[tuple[str, Case, bool]]:
    """Providers, what they are asked for, and whether in deterministic mode."""
    for shape in SHAPES:
        for mode in ("fwd", "bwd"):
            yield "flashjvp", case_of(shape, mode), False
    yield "flashjvp", case_of(SHAPES[0], "bwd"), True
    for change in ({"kv_heads": 8}, {"dtype": "float16"}):
        for mode in ("fwd", "bwd"):
            yield "flashjvp", case_of(SHAPES[0], mode, **change), False
    for shape in SHAPES[:2]:
        for mode in ("fwd", "bwd", "plain-fwd", "plain-bwd"):
            yield "flashjvp", case_of(shape, mode, mask="bool"), False
    for shape in SHAPES[:5]:
        for mode in ("plain-fwd", "plain-bwd"):
            yield "flashjvp", case_of(shape, mode), False
            yield "plain-flash", case_of(shape, mode), False
    for mode in ("fwd", "bwd"):
        yield "flashjvp", case_of(TF32, mode, dtype="float32"), False
        yield "math", case_of(TF32, mode, dtype="float32"), False


def case_of(shape: Sequence[int], mode: str, **change: Any) -> Case:
    """A square case in bfloat16 without a mask, but for a `change` of its fields."""
    batch, heads, length, head_dim = shape
    case = Case(
        mode=mode, batch=batch, heads=heads, kv_heads=heads, queries=length, keys=length, head_dim=head_dim,
        dtype="bfloat16", causal=False,
    )  # fmt: skip
    return replace(case, **change)


@contextmanager
def settings(deterministic: bool) -> Iterator[None]:
    """TF32 for float32 products, and PyTorch's deterministic mode or not, in this block."""
    was_on, precision = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warn_only)
        torch.backends.cuda.matmul.fp32_precision = precision


def measured(provider: str, case: Case, deterministic: bool, device: torch.device) -> InterleavedTiming:
    """Times a call, interleaved with the matrix product; float32 in TF32, as the product is."""
    inputs = make_inputs(case, device)
    if case.backward:
        require_gradients(inputs)
    size, dtype = CEILING_SIZE[device.type], DTYPES[case.dtype]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    call, product = work(PROVIDERS[provider].load(), inputs, case.mode), Work(lambda _: a @ b)
    with settings(deterministic):
        products, calls = [latency(product, device).p50_ms], []
        for _ in range(ROUNDS):
            calls.append(latency(call, device).p50_ms)
            products.append(latency(product, device).p50_ms)
    ms, product_tflops = statistics.median(calls), 2 * size**3 / (statistics.median(products) * 1e9)
    tflops = operations(case) / (ms * 1e9)
    return InterleavedTiming(
        provider=provider, mode=case.mode, batch=case.batch, heads=case.heads, kv_heads=case.kv_heads,
        queries=case.queries, head_dim=case.head_dim, mask=case.mask, dtype=case.dtype,
        products="tf32" if case.dtype == "float32" else "ieee", deterministic=deterministic, latency_ms=ms,
        tflops=tflops, product_tflops=product_tflops, of_ceiling=tflops / product_tflops, machine=machine(device),
        torch_version=torch.__version__, triton_version=version("triton"), commit=commit(),
    )  # fmt: skip


def table(timings: Sequence[InterleavedTiming]) -> Table:
    """A line a call."""
    found = Table(title="calls, interleaved with a matrix product")
    for name in ("B, H, N, D", "call", "provider", "ms", "TFLOP/s", "product TFLOP/s", "of ceiling"):
        found.add_column(name, justify="left" if name in ("call", "provider") else "right")
    for x in timings:
        shape = f"{x.batch}, {x.heads}, {x.queries}, {x.head_dim}"
        numbers = (f"{x.latency_ms:.3f}", f"{x.tflops:.0f}", f"{x.product_tflops:.0f}", f"{x.of_ceiling:.2f}")
        found.add_row(shape, call_name(x), x.provider, *numbers)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all calls were timed; rows are written as they come."""
    parser = types.parser(program("bench.interleaved"), (__doc__ or "").split("\n\n")[1])
    parser.add_argument(
        "--out", type=outputs.path_with(".csv"), metavar="PATH", required=True,
        help=f"for the rows, written after every call: {outputs.HELP % '.csv'}",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none: elsewhere `python -m bench.sweep` says what there is")
    try:
        path = outputs.prepared(options.out, "interleaved.csv", (".csv",), outputs.has_columns(INTERLEAVED_COLUMNS))
    except outputs.OutputError as error:
        parser.error(f"--out: {error}")
    timings: list[InterleavedTiming] = []
    console = terminal.console()
    for provider, case, deterministic in plan():
        timings.append(measured(provider, case, deterministic, torch.device("cuda")))
        write_rows(path, timings, INTERLEAVED_COLUMNS)
        x = timings[-1]
        console.print(
            f"{provider} {call_name(x)} {case.queries} {case.head_dim}: {x.latency_ms:.3f} ms, {x.of_ceiling:.2f}"
        )
    console.print(terminal.Fitted(table(timings), names=3))
    return 0


if __name__ == "__main__":
    sys.exit(ending.run(main))
