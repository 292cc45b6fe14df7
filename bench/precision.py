"""`python -m bench.precision`: errors of half types against the size of scores, dense, by default and with
precision="high", and what the precision costs; a CSV row for each.

Errors are relative, of whole tensors against float64. Times are medians of calls one after the other, of q, k, v with a
tangent each, forward and JVP, then backward through both; the last rows have them.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import flashjvp
from flashjvp_commands import arguments as types
from flashjvp_commands import ending, outputs
from flashjvp_commands.entry import program
from reports.environment import commit, machine, version
from reports.precision import PRECISION_COLUMNS, PrecisionRow
from reports.schema import write_rows
from verify.cases.case import Case as Numbers
from verify.cases.inputs import Inputs
from verify.cases.inputs import make_inputs as numbers
from verify.oracles.attention import NAMES, Results, dense64, dense_same_type, run

from .cases import Case, make_inputs, require_gradients
from .measure import latency, work

SCORES = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
HEAD_DIMS, DTYPES = (64, 128), ("bfloat16", "float16")
PROVIDERS: dict[str, Callable[[Inputs], Results]] = {
    "dense": dense_same_type, "default": run, "high": lambda inputs: run(inputs, precision="high")
}  # fmt: skip
TURNS = 3


def errors(
    dtype: str, head_dim: int, heads: int, tokens: int, device: torch.device, where: dict[str, Any]
) -> Iterator[PrecisionRow]:
    """Of each provider at scores of each size."""
    shape: dict[str, Any] = {"q_heads": heads, "kv_heads": heads, "m": tokens, "n": tokens}
    for scores in SCORES:
        case = Numbers("scores", batch=(1,), **shape, d=head_dim, dv=head_dim, magnitude=scores)
        inputs = numbers(case, getattr(torch, dtype), device)
        exact = dense64(inputs)
        for provider, results in PROVIDERS.items():
            found = results(inputs)
            of: dict[str, Any] = {name: _error(getattr(found, name), getattr(exact, name)) for name in NAMES}
            yield PrecisionRow(
                dtype=dtype, head_dim=head_dim, heads=heads, tokens=tokens, provider=provider, scores=scores, **of,
                **where,
            )  # fmt: skip


def _error(found: Tensor, exact: Tensor) -> float:
    return float(f"{float((found.double() - exact).norm() / exact.norm()):.3g}")


def times(
    dtype: str, head_dim: int, heads: int, tokens: int, device: torch.device, where: dict[str, Any]
) -> Iterator[PrecisionRow]:
    """By default and with precision="high", in turns."""
    case = Case(
        mode="fwd+bwd", batch=1, heads=heads, kv_heads=heads, queries=tokens, keys=tokens, head_dim=head_dim,
        dtype=dtype, causal=False,
    )  # fmt: skip
    inputs = make_inputs(case, device)
    require_gradients(inputs)

    def call(precision: Any) -> Callable[[Inputs], tuple[Tensor, ...]]:
        return lambda x: flashjvp.attention_jvp(x.q, x.k, x.v, x.q_t, x.k_t, x.v_t, precision=precision)

    calls = {"default": call(None), "high": call("high")}
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(TURNS):
        for provider, attention in calls.items():
            for mode in ("fwd", "bwd"):
                taken = latency(work(attention, inputs, mode), device).p50_ms
                samples.setdefault((provider, mode), []).append(taken)
    for provider in calls:
        fwd_ms, bwd_ms = (float(f"{statistics.median(samples[provider, mode]):.4g}") for mode in ("fwd", "bwd"))
        yield PrecisionRow(
            dtype=dtype, head_dim=head_dim, heads=heads, tokens=tokens, provider=provider, fwd_ms=fwd_ms,
            bwd_ms=bwd_ms, **where,
        )  # fmt: skip


def measured(device: torch.device, heads: int, tokens: int, timed: tuple[int, int]) -> Iterator[PrecisionRow]:
    """All rows: errors for so many heads and tokens, then times for those `timed`."""
    where = {
        "machine": machine(device), "torch_version": torch.__version__, "triton_version": version("triton"),
        "commit": commit(),
    }  # fmt: skip
    for of, sizes in ((errors, (heads, tokens)), (times, timed)):
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                yield from of(dtype, head_dim, *sizes, device, where)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all rows were measured; they are written as they come."""
    given = types.parser(program("bench.precision"), (__doc__ or "").split("\n\n")[1])
    given.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
    given.add_argument("--heads", type=types.whole(1), default=4, help="of the calls whose errors are taken (4)")
    given.add_argument("--tokens", type=types.whole(1), default=1024, help="of these calls (1024)")
    given.add_argument("--timed", type=types.whole(1), default=4096, help="tokens of the calls timed (4096)")
    given.add_argument(
        "--out", type=outputs.path_with(".csv"), metavar="PATH",
        help=f"for the rows, written as they come: {outputs.HELP % '.csv'}; without it they are only printed",
    )  # fmt: skip
    options = given.parse_args(arguments)
    name = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    if name == "cuda" and not torch.cuda.is_available():
        given.error("--device: expected a CUDA GPU, found none")
    device = torch.device("cpu" if name == "auto" else name)
    try:
        expected = outputs.has_columns(PRECISION_COLUMNS)
        path = options.out and outputs.prepared(options.out, "precision.csv", (".csv",), expected)
    except outputs.OutputError as error:
        given.error(f"--out: {error}")
    rows: list[PrecisionRow] = []
    console = Console()
    heads_timed = 24 if device.type == "cuda" else 1
    for x in measured(device, options.heads, options.tokens, (heads_timed, options.timed)):
        rows.append(x)
        if path:
            write_rows(path, rows, PRECISION_COLUMNS)
        console.print(_words(x), highlight=False, soft_wrap=True)
    return 0


def _words(x: PrecisionRow) -> str:
    what = f"{x.dtype} D={x.head_dim} {x.provider}"
    if x.fwd_ms is not None:
        return f"{what}: {x.fwd_ms} ms forward, {x.bwd_ms} backward"
    return f"{what} scores {x.scores:g}: " + " ".join(f"{name} {getattr(x, name):.1e}" for name in NAMES)


if __name__ == "__main__":
    sys.exit(ending.run(main))
