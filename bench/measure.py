"""How a call is measured: its results, its latency, its host time and its peak memory."""

import contextlib
import ctypes
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verify.cases.inputs import Inputs

from .cases import differentiable
from .providers import Attention

WARM_UP_S = {"cpu": 0.1, "cuda": 0.1}
BUDGET_S = {"cpu": 2.0, "cuda": 0.4}
REPEATS = {"cpu": (3, 30), "cuda": (5, 200)}
SLOW_S = 5.0  # after so long a call is not repeated further, however few the repeats
HOST_BATCHES, HOST_CALLS = 10, 20


@dataclass(frozen=True)
class Work:
    """What is measured: `run`, given what `prepare` returns, which is not measured."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> object:
        return self.run(self.prepare())


@dataclass(frozen=True)
class Latency:
    """Percentiles over the repeats, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int


def results(attention: Attention, inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    """The outputs, and with a backward the gradients of all of them in all inputs and tangents."""
    outputs = attention(inputs)
    return (*outputs, *_gradients(outputs, inputs)) if backward else outputs


def work(attention: Attention, inputs: Inputs, mode: str) -> Work:
    """The call of a mode; where only the backward is measured, a forward prepares each call."""
    what = mode.split("-")[-1]
    if what == "bwd":
        return Work(lambda outputs: _gradients(outputs, inputs), lambda: attention(inputs))
    return Work(lambda _: results(attention, inputs, what == "fwd+bwd"))


def latency(work: Work, device: torch.device, repeat_s: float | None = None) -> Latency:
    """Time of one call: CUDA events with a cold L2 on a GPU, the wall clock on a CPU; warmed up, median and spread.

    repeat_s: seconds of repeats, in place of the usual ones, and of warm-up at most.
    """
    budget_s = BUDGET_S[device.type] if repeat_s is None else repeat_s
    warm_up_s = min(WARM_UP_S[device.type], budget_s)
    if device.type == "cuda":
        samples_ms = _cuda_samples_ms(work, device, warm_up_s, budget_s)
    else:
        samples_ms = _cpu_samples_ms(work, warm_up_s, budget_s)
    quantiles = torch.quantile(torch.tensor(samples_ms, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    p20, p50, p80 = quantiles.tolist()
    return Latency(p20, p50, p80, len(samples_ms))


def host_us(work: Work, device: torch.device) -> float:
    """Wall time until a call returns to the host, which on a GPU is before its kernels end: median over batches."""
    return statistics.median(host_samples_us(work, device, HOST_BATCHES))


def host_samples_us(work: Work, device: torch.device, batches: int) -> list[float]:
    """The same of each batch of calls; one before them warms up."""
    samples = []
    for _ in range(1 + batches):
        prepared = [work.prepare() for _ in range(HOST_CALLS)]
        _wait(device)
        start = time.perf_counter()
        for state in prepared:
            work.run(state)
        samples.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
        _wait(device)
    return samples[1:]


def peak_mib(work: Work, device: torch.device) -> float:
    """Peak memory of one call above what is held before it and before what prepares it.

    On a GPU it is the allocator's peak. On a CPU it is the growth of the resident set, which is right only in a
    process whose allocator holds no large free blocks: measure in a fresh process, after a tiny call that starts the
    thread pools.
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        state = work.prepare()
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        work.run(state)
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    _return_free_memory()
    before = _status_bytes("VmRSS")
    state = work.prepare()
    _reset_peak_resident()
    work.run(state)
    return max(_status_bytes("VmHWM") - before, 0) / 2**20


def _gradients(outputs: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    given = [(o, x) for o, x in zip(outputs, (inputs.d_o, inputs.d_o_t), strict=False) if x is not None]
    sources, cotangents = [o for o, _ in given], [x for _, x in given]
    if len(given) == len(outputs):
        return torch.autograd.grad(sources, differentiable(inputs), cotangents)
    return torch.autograd.grad(sources, differentiable(inputs), cotangents, materialize_grads=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_samples_ms(work: Work, warm_up_s: float, budget_s: float) -> list[float]:
    """Calls until the budget is spent; those that began during the warm-up count only where few others were made."""
    fewest, most = REPEATS["cpu"]
    early: list[float] = []
    samples: list[float] = []
    start = time.perf_counter()
    while True:
        state = work.prepare()
        before = time.perf_counter()
        work.run(state)
        after = time.perf_counter()
        del state  # else it lives on while the next one is made
        (early if before - start < warm_up_s else samples).append((after - before) * 1e3)
        enough = len(early) + len(samples) >= fewest or after - start >= SLOW_S
        if len(samples) >= most or (enough and after - start >= budget_s):
            return samples if len(samples) >= fewest else early + samples


def _cuda_samples_ms(work: Work, device: torch.device, warm_up_s: float, budget_s: float) -> list[float]:
    """As many calls as the budget allows; the host runs ahead of the device, as it does in training."""
    start = time.perf_counter()
    calls = 0
    while calls < 2 or time.perf_counter() - start < warm_up_s:
        work()
        _wait(device)
        calls += 1
    fewest, most = REPEATS["cuda"]
    estimate_s = (time.perf_counter() - start) / calls
    fewest = min(fewest, max(int(SLOW_S / estimate_s), 1))
    repeats = min(max(int(budget_s / estimate_s), fewest), most)
    with torch.cuda.device(device):
        cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in events:
            state = work.prepare()
            cache.zero_()  # evicts what the last call, or the forward before a backward, left in L2
            before.record()
            work.run(state)
            after.record()
            del state
        _wait(device)
    return [before.elapsed_time(after) for before, after in events]


def _return_free_memory() -> None:
    """Gives the allocator's free blocks back to the system, so that using them again counts."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _reset_peak_resident() -> None:
    """Sets the peak of the resident set to its present size where the system permits.

    Elsewhere the peak so far stays, which in a fresh process is close to the present size.
    """
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status_bytes(field: str) -> int:
    """A line of /proc/self/status in bytes; the peak resident set where there is no such file."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
