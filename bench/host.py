"""`python -m bench.host`: where the host's time of a call goes; a row of CSV for each call and each of its parts.

Parts are timed alone: the tensors that a call allocates, its launches, and of those what Triton's C code and the driver
take. Beside them stands what PyTorch takes for the same call of a function that does nothing, or of its own attention,
and what the GPU takes without a host, which is the replay of a CUDA graph. Times are of wall clock until a call
returns, over batches of calls between which the GPU is waited for; a call and its parts take turns, batch by batch,
because the speed of a host that others share drifts.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention

from flashjvp.kernels.launch.driver import Launch
from flashjvp.kernels.launch.replay import CapturedCall
from flashjvp_commands import arguments as types
from flashjvp_commands import ending, outputs, terminal
from flashjvp_commands.entry import program
from reports.environment import commit, machine, version
from reports.host_times import HOST_COLUMNS, HostTime
from reports.schema import write_rows
from verify.cases.inputs import Inputs

from .cases import Case, differentiable, make_inputs, reduced, require_gradients
from .interleaved import case_of
from .measure import Work, host_samples_us, latency, work
from .providers import PROVIDERS, Attention

BATCHES = 40
SHAPE = (1, 24, 1024, 128)
LAYERS = 28  # of a chain, as of DiT-XL
CHAINED = "bwd, of a layer"
WARM_CALLS = 3  # the first is checked and compiled, the second captured
PLAN = (  # a call, the mode that it is a case of, its mask
    ("fwd", "fwd", "none"),
    ("fwd", "fwd", "bool"),
    ("fwd, node", "fwd", "none"),
    ("func.jvp", "fwd", "none"),
    ("bwd", "bwd", "none"),
    ("bwd", "bwd", "bool"),
    ("plain-fwd", "plain-fwd", "none"),
    ("plain-fwd", "plain-fwd", "bool"),
    ("plain-bwd", "plain-bwd", "none"),
    ("plain-bwd", "plain-bwd", "bool"),
    (CHAINED, "bwd", "none"),
)


@dataclass(frozen=True)
class Replayed:
    """What a call does below PyTorch: the tensors that it allocates, its launches, and what they give to C."""

    calls: list[CapturedCall]
    launches: list[Callable[[], object]]
    given_to_c: list[Callable[[], object]]

    def allocate(self) -> None:
        for call in self.calls:
            for shape, strides, dtype, _ in call._buffers:
                call._allocate(shape, strides, dtype)


class _Empty(Function):
    """Nothing, of as many inputs, outputs and gradients as attention has."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return tuple([torch.empty_like(x) for x in inputs[:outputs]])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, *ctx.saved_tensors


def parts(call: str, case: Case, device: torch.device) -> Iterator[tuple[str, int, Work]]:
    """The name of each part, how many there are of it, and the part as work."""
    if call == CHAINED:
        for part, one in (("all", PROVIDERS["flashjvp"].load()), ("empty", _nothing)):
            whole = _chained(one, case, device)
            yield part, LAYERS, whole
            yield "one thread" if part == "all" else f"{part}, one thread", LAYERS, _in_one_thread(whole)
        return
    inputs, whole = _whole(call, case, device)
    yield "all", 1, whole
    if case.backward:
        yield "one thread", 1, _in_one_thread(whole)
    if (empty := _empty(call, inputs)) is not None:
        yield "empty", 1, empty
        if case.backward:
            yield "empty, one thread", 1, _in_one_thread(empty)
    if case.plain:
        yield "sdpa", 1, work(lambda x: (scaled_dot_product_attention(x.q, x.k, x.v, x.mask),), inputs, case.mode)
    replayed = _replayed(whole)
    yield "buffers", sum(len(call._buffers) for call in replayed.calls), Work(lambda _: replayed.allocate())
    yield "launches", len(replayed.launches), Work(lambda _: [launch() for launch in replayed.launches])
    yield "driver", len(replayed.given_to_c), Work(lambda _: [launch() for launch in replayed.given_to_c])


def _whole(call: str, case: Case, device: torch.device) -> tuple[Inputs, Work]:
    """A call, and what it is of."""
    inputs = make_inputs(case, device)
    if case.backward or call == "fwd, node":
        require_gradients(inputs)
    attention = PROVIDERS["flashjvp-func-jvp" if call == "func.jvp" else "flashjvp"].load()
    return inputs, work(attention, inputs, case.mode)


def _chained(one: Attention, case: Case, device: torch.device) -> Work:
    """The backward pass of LAYERS calls, o and o_t of each the q and q_t of the next."""
    layers = [make_inputs(case, device, seed) for seed in range(LAYERS)]
    for x in layers:
        require_gradients(x)
    later = [y for x in layers[1:] for i, y in enumerate(differentiable(x)) if i % 3]  # q and q_t are no leaves there
    leaves = [*differentiable(layers[0]), *later]
    cotangents = [y for y in (layers[0].d_o, layers[0].d_o_t) if y is not None]

    def forward() -> tuple[Tensor, ...]:
        results = one(layers[0])
        for x in layers[1:]:
            results = one(replace(x, q=results[0], q_t=results[1]))
        return results

    return Work(lambda results: torch.autograd.grad(results, leaves, cotangents), forward)


def _nothing(x: Inputs) -> tuple[Tensor, ...]:
    tensors = differentiable(x)
    found: tuple[Tensor, ...] = _Empty.apply(len(tensors) // 3, *tensors)
    return found


def _empty(call: str, x: Inputs) -> Work | None:
    """What PyTorch does around such a call; None where there is nothing."""
    if call == "func.jvp":
        primals, tangents = (x.q, x.k, x.v), (x.q_t, x.k_t, x.v_t)
        return Work(lambda _: torch.func.jvp(lambda q, k, v: q, primals, tangents))
    if x.q.requires_grad:
        cotangents = [y for y in (x.d_o, x.d_o_t) if y is not None]
        if not cotangents:
            return Work(lambda _: _nothing(x))
        return Work(lambda results: torch.autograd.grad(results, differentiable(x), cotangents), partial(_nothing, x))
    return None


def _in_one_thread(call: Work) -> Work:
    """A backward pass in the thread that asks for it: PyTorch has one for each GPU, which it wakes for each pass."""

    def run(state: Any) -> object:
        with torch.autograd.set_multithreading_enabled(False):
            return call.run(state)

    return Work(run, call.prepare)


def _replayed(call: Work) -> Replayed:
    """Watches one call, after enough others that it is replayed."""
    calls: list[CapturedCall] = []
    launches: list[Callable[[], object]] = []
    given: list[Callable[[], object]] = []
    replay, launch = CapturedCall._replay, Launch.__call__

    def seen_replay(self: CapturedCall, tensors: Any, addresses: Any) -> Any:
        calls.append(self)
        return replay(self, tensors, addresses)

    def seen_launch(self: Launch, tensors: Any, addresses: Any, *rest: Any) -> None:
        launches.append(partial(launch, self, tensors, addresses, *rest))
        direct: Any = self._direct
        c = direct._launch

        def seen_by_c(*args: Any) -> None:
            given.append(partial(c, *args))
            c(*args)

        with mock.patch.object(direct, "_launch", seen_by_c):
            launch(self, tensors, addresses, *rest)

    for _ in range(WARM_CALLS):
        state = call.prepare()
        call.run(state)
    state = call.prepare()
    with mock.patch.object(CapturedCall, "_replay", seen_replay), mock.patch.object(Launch, "__call__", seen_launch):
        call.run(state)
    torch.cuda.synchronize()
    if not calls:
        raise RuntimeError("expected a call that is replayed, got one that is not")
    return Replayed(calls, launches, given)


def device_us(call: str, case: Case, device: torch.device) -> float:
    """Median time of a call's kernels on the GPU, replayed from a CUDA graph with a cold L2."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # a backward pass runs where its forward did, and ends where its leaves were made
        _, run = _whole(call, case, device)
        for _ in range(WARM_CALLS):
            run()
        state = run.prepare()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        kept = run.run(state)
    us = latency(Work(lambda _: graph.replay()), device).p50_ms * 1e3
    del kept
    return us


def measured(call: str, case: Case, device: torch.device) -> list[HostTime]:
    """The rows of a call; of a chain of them, by their number."""
    found, alone = list(parts(call, case, device)), call != CHAINED
    samples: list[list[float]] = [[] for _ in found]
    for _ in range(BATCHES):
        for (_, _, run), times in zip(found, samples, strict=True):
            times += host_samples_us(run, device, 1)
    rows = []
    for (part, count, run), times in zip(found, samples, strict=True):
        p20, p50, p80 = (us / (1 if alone else count) for us in statistics.quantiles(times, n=10)[1::3])
        row = HostTime(
            call=call, mask=case.mask, part=part, batch=case.batch, heads=case.heads, queries=case.queries,
            head_dim=case.head_dim, dtype=case.dtype, count=count, p20_us=p20, p50_us=p50, p80_us=p80,
            device_us=device_us(call, case, device) if part == "all" and alone else None,
            latency_us=latency(run, device).p50_ms * 1e3 if part == "all" and alone else None,
            host=machine(torch.device("cpu")), machine=machine(device), torch_version=torch.__version__,
            triton_version=version("triton"), commit=commit(),
        )  # fmt: skip
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all calls were timed; rows are written as they come."""
    parser = types.parser(program("bench.host"), (__doc__ or "").split("\n\n")[1])
    parser.add_argument(
        "--out", type=outputs.path_with(".csv"), metavar="PATH", required=True,
        help=f"for the rows, written after every call: {outputs.HELP % '.csv'}",
    )  # fmt: skip
    default = ",".join(map(str, SHAPE))
    parser.add_argument(
        "--shape", type=_shape, metavar="B,H,N,D", default=SHAPE, help=f"of q, k, v (default {default})"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none: calls on a CPU have no launches")
    try:
        out = outputs.prepared(options.out, "host.csv", (".csv",), outputs.has_columns(HOST_COLUMNS))
    except outputs.OutputError as error:
        parser.error(f"--out: {error}")
    rows: list[HostTime] = []
    console = terminal.console()
    for call, mode, mask in PLAN:
        case = case_of(options.shape, mode, mask=mask)
        # in a chain the host would wait for long kernels: launches that were not started yet are limited in number
        found = measured(call, reduced(case) if call == CHAINED else case, torch.device("cuda"))
        write_rows(out, rows := [*rows, *found], HOST_COLUMNS)
        times = ", ".join(f"{row.part} {row.p50_us:.1f}" for row in found)
        console.print(f"{call}, mask {mask}: {times} us", highlight=False)
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = types.wholes(1)(text)
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected four sizes B,H,N,D, got {text!r}")
    return tuple(sizes)


if __name__ == "__main__":
    sys.exit(ending.run(main))
