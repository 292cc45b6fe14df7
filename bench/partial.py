"""`python -m bench.partial`: packed sequences, windows and block masks against dense calls; a CSV row for each.

`share` is how many of the dense call's scores are visible, `of_ideal` the dense call's time times that share over the
time measured. `of_portable` is the same against the dense call on the portable kernels. For block masks, `block_share`
is how many blocks of 128 x 128 scores have a visible one, and `of_blocks` is to that as `of_ideal` to `share`: 1 where
blocks that are skipped cost nothing. Results are not judged here: `python -m verify` does that.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import flashjvp
from flashjvp.kernels.launch import replaced
from flashjvp_commands import arguments as types
from flashjvp_commands import ending, outputs
from flashjvp_commands.entry import program
from reports.environment import commit, machine, version
from reports.schema import write_rows
from verify.cases.inputs import Inputs

from .cases import Case, make_inputs, require_gradients
from .measure import Work, latency, work

MODES = ("fwd", "bwd")
IMAGES = (4096, 1024, 256, 2304, 256, 4096, 576, 1024, 3136, 256, 1024, 1764)
"""Tokens of the images of a batch of mixed sizes."""
WINDOW = (512, 511)


@dataclass(frozen=True, kw_only=True)
class PartialRow:
    """One call: medians in milliseconds, of it and of the dense call of `batch` sequences of `tokens`."""

    preset: str
    what: str
    mode: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    share: float
    block_share: float | None
    ms: float
    dense_ms: float
    portable_ms: float
    of_ideal: float
    of_portable: float
    of_blocks: float | None
    machine: str
    torch_version: str
    triton_version: str
    commit: str


COLUMNS = tuple(field.name for field in fields(PartialRow))
Attention = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Subject:
    """What is measured: a call of inputs like those of the dense call, and the share of scores that are visible.

    block_share: of a block mask, the share of its blocks that are not skipped.
    """

    what: str
    share: float
    call: Attention
    packed: int = 0  # rows of all sequences of a batch entry, or none
    block_share: float | None = None


def dense(**options: Any) -> Attention:
    """attention_jvp with these options."""

    def call(x: Inputs) -> tuple[Tensor, ...]:
        return flashjvp.attention_jvp(x.q, x.k, x.v, x.q_t, x.k_t, x.v_t, **options)

    return call


def varlen(images: Sequence[int], tokens: int, device: torch.device) -> Subject:
    """Sequences of these lengths, of the rows of one batch entry; a dense call has sequences of `tokens`."""
    total = sum(images)
    cu = torch.tensor([0, *itertools.accumulate(images)], dtype=torch.int32, device=device)

    def call(x: Inputs) -> tuple[Tensor, ...]:
        rows = [None if t is None else t[0].transpose(0, 1) for t in (x.q, x.k, x.v, x.q_t, x.k_t, x.v_t)]
        q, k, v, *tangents = rows
        assert q is not None and k is not None and v is not None
        found = flashjvp.attention_varlen_jvp(q, k, v, cu, cu, None, None, *tangents)
        return tuple(o.transpose(0, 1)[None] for o in found)

    share = sum(length**2 for length in images) / (total // tokens * tokens**2)
    return Subject(f"{len(images)} sequences", share, call, packed=total)


def window(tokens: int, sides: tuple[int, int]) -> Subject:
    """A window of so many keys on each side."""
    left, right = sides
    seen = sum(min(tokens - 1, m + right) - max(0, m - left) + 1 for m in range(tokens))
    return Subject(f"window {left}, {right}", seen / tokens**2, dense(window=sides))


def of_blocks(what: str, share: float, mask: Any) -> Subject:
    """A block mask."""
    return Subject(what, share, dense(attn_mask=mask), block_share=1 - mask.sparsity() / 100)


def documents(tokens: int, count: int, device: torch.device) -> Subject:
    """So many documents of one length, packed."""
    from torch.nn.attention.flex_attention import create_block_mask

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i * count // tokens == j * count // tokens

    mask = create_block_mask(same, None, None, tokens, tokens, device=str(device))
    return of_blocks(f"{count} documents", 1 / count, mask)


def causal(tokens: int, device: torch.device) -> Subject:
    """A causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    def before(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    mask = create_block_mask(before, None, None, tokens, tokens, device=str(device))
    return of_blocks("causal block mask", (tokens + 1) / (2 * tokens), mask)


def neighbours(side: int, kernel: int, device: torch.device) -> Subject:
    """Square neighbourhoods in an image."""
    mask = flashjvp.neighbourhood((side, side), kernel, device=device)
    return of_blocks(f"neighbourhood {kernel} of {side}", (kernel / side) ** 2, mask)


def _shape(batch: int, heads: int, tokens: int, head_dim: int, dtype: str) -> Case:
    return Case(
        mode="fwd", batch=batch, heads=heads, kv_heads=heads, queries=tokens, keys=tokens, head_dim=head_dim,
        dtype=dtype, causal=False,
    )  # fmt: skip


def subjects(preset: str, device: torch.device) -> Iterator[tuple[Case, Subject]]:
    """Dense calls, and what is measured against them."""
    half = "bfloat16" if device.type == "cuda" else "float32"
    if preset == "varlen":
        for head_dim in (64, 72, 128):
            yield _shape(sum(IMAGES) // 4096, 16, 4096, head_dim, half), varlen(IMAGES, 4096, device)
    elif preset == "window":
        for head_dim in (64, 128):
            yield _shape(1, 16, 16384, head_dim, half), window(16384, WINDOW)
    elif preset == "blocks":
        for head_dim in (64, 128):
            for subject in (documents(16384, 2, device), documents(16384, 10, device), causal(16384, device)):
                yield _shape(1, 16, 16384, head_dim, half), subject
        yield _shape(1, 16, 16384, 64, half), neighbours(128, 16, device)
    else:
        yield _shape(2, 2, 64, 16, half), varlen((60, 20, 48), 64, device)
        yield _shape(1, 2, 256, 16, half), window(256, (40, 20))
        yield _shape(1, 2, 256, 16, half), documents(256, 2, device)
        yield _shape(1, 2, 256, 16, half), neighbours(16, 4, device)


PRESETS = ("varlen", "window", "blocks", "quick")


def measured(preset: str, case: Case, subject: Subject, device: torch.device) -> PartialRow:
    """Times the call, the dense call, and the dense call on the portable kernels."""

    def ms(attention: Attention, of: Case) -> float:
        inputs = make_inputs(of, device)
        if of.backward:
            require_gradients(inputs)
        timed: Work = work(attention, inputs, of.mode)
        return latency(timed, device).p50_ms

    rows, blocks = subject.packed, subject.block_share
    of_subject = replace(case, batch=1, queries=rows, keys=rows) if rows else case
    taken, whole = ms(subject.call, of_subject), ms(dense(), case)
    with replaced.pipelines({}):
        portable = ms(dense(), case)
    return PartialRow(
        preset=preset, what=subject.what, mode=case.mode, batch=case.batch, heads=case.heads, tokens=case.queries,
        head_dim=case.head_dim, dtype=case.dtype, share=subject.share, block_share=blocks, ms=taken, dense_ms=whole,
        portable_ms=portable, of_ideal=whole * subject.share / taken, of_portable=portable * subject.share / taken,
        of_blocks=None if blocks is None else whole * blocks / taken, machine=machine(device),
        torch_version=torch.__version__, triton_version=version("triton"), commit=commit(),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all calls were timed; rows are written as they come."""
    given = types.parser(program("bench.partial"), (__doc__ or "").split("\n\n")[1])
    given.add_argument(
        "--preset", type=types.names_out_of(list(PRESETS)), default=list(PRESETS[:3]), metavar="NAME,...",
        help=f"out of {', '.join(PRESETS)} (all but quick)",
    )  # fmt: skip
    given.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any")
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
        path = options.out and outputs.prepared(options.out, "partial.csv", (".csv",), outputs.has_columns(COLUMNS))
    except outputs.OutputError as error:
        given.error(f"--out: {error}")
    rows: list[PartialRow] = []
    console = Console()
    for preset in options.preset:
        for case, subject in subjects(preset, device):
            for mode in MODES:
                x = measured(preset, replace(case, mode=mode), subject, device)
                rows.append(x)
                if path:
                    write_rows(path, rows, COLUMNS)
                console.print(
                    f"{x.preset} {x.what} {x.mode} {x.batch}, {x.heads}, {x.tokens}, {x.head_dim}: {x.ms:.3f} ms, "
                    f"{x.of_ideal:.2f} of ideal, {x.of_portable:.2f} of the portable kernels'"
                    + ("" if x.of_blocks is None else f", {x.of_blocks:.2f} of its blocks'"),
                    highlight=False, soft_wrap=True,
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(ending.run(main))
