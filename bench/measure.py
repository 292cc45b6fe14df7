"""How a call is measured: its results, its latency and its peak memory."""

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verify.cases import Inputs

from .cases import six
from .providers import Attention

Call = Callable[[], object]

WARM_UP_S = {"cpu": 0.1, "cuda": 0.3}
BUDGET_S = {"cpu": 4.0, "cuda": 2.0}
REPEATS = {"cpu": (3, 30), "cuda": (10, 100)}
SLOW_S = 20.0  # on a CPU, calls so slow are repeated less often than that


@dataclass(frozen=True)
class Latency:
    """Percentiles over the repeats, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int


def results(attention: Attention, inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    """The measured call: (o, o_t), and with a backward the gradients of both in q, k, v, q_t, k_t, v_t."""
    outputs = attention(inputs)
    if not backward:
        return outputs
    return (*outputs, *torch.autograd.grad(outputs, six(inputs), (inputs.d_o, inputs.d_o_t)))


def latency(call: Call, device: torch.device) -> Latency:
    """Time of one call: CUDA events with a cold L2 on a GPU, the wall clock on a CPU; warmed up, median and spread."""
    samples_ms = _cuda_samples_ms(call, device) if device.type == "cuda" else _cpu_samples_ms(call)
    quantiles = torch.quantile(torch.tensor(samples_ms, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    p20, p50, p80 = quantiles.tolist()
    return Latency(p20, p50, p80, len(samples_ms))


def peak_mib(call: Call, device: torch.device) -> float:
    """Peak memory of one call above what is held before it.

    On a GPU it is the allocator's peak. On a CPU it is the growth of the resident set, which is right only in a
    process whose allocator holds no large free blocks: measure in a fresh process, after a tiny call that starts the
    thread pools.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    _return_free_memory()
    before = _reset_peak_resident()
    call()
    return max(_peak_resident() - before, 0) / 2**20


def _cpu_samples_ms(call: Call) -> list[float]:
    """Calls until the budget is spent; those that began during the warm-up count only where few others were made."""
    fewest, most = REPEATS["cpu"]
    early: list[float] = []
    samples: list[float] = []
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        (early if before - start < WARM_UP_S["cpu"] else samples).append((after - before) * 1e3)
        enough = len(early) + len(samples) >= fewest or after - start >= SLOW_S
        if len(samples) >= most or (enough and after - start >= BUDGET_S["cpu"]):
            return samples if len(samples) >= fewest else early + samples


def _cuda_samples_ms(call: Call, device: torch.device) -> list[float]:
    start = time.perf_counter()
    calls = 0
    while calls < 2 or time.perf_counter() - start < WARM_UP_S["cuda"]:
        call()
        torch.cuda.synchronize(device)
        calls += 1
    fewest, most = REPEATS["cuda"]
    estimate_s = (time.perf_counter() - start) / calls
    repeats = min(max(int(BUDGET_S["cuda"] / estimate_s), fewest), most)
    with torch.cuda.device(device):
        cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for before, after in events:
            cache.zero_()  # evicts what the last call left in L2
            before.record()
            call()
            after.record()
        torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in events]


def _return_free_memory() -> None:
    """Gives the allocator's free blocks back to the system, so that using them again counts."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _reset_peak_resident() -> int:
    """Sets the peak of the resident set to its present size where the system permits; returns that size in bytes."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # the peak so far stays; in a fresh process it is close to the present size
    return _status_bytes("VmRSS")


def _peak_resident() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    """A line of /proc/self/status in bytes; the peak resident set where there is no such file."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
