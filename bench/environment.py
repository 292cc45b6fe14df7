"""Where a sweep runs: machine, versions, commit, and the device's own ceiling, measured in the same run."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from reports.environment import commit, driver, machine, version

from .cases import DTYPES
from .measure import Work, latency

CEILING_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The environment columns of a row."""

    device: str
    machine: str
    driver: str
    threads: int
    torch_version: str
    triton_version: str
    commit: str
    ceiling_tflops: float
    ceiling_gbs: float


def describe(device: torch.device, dtype: str) -> Environment:
    """The environment of a sweep on `device`; measures its ceilings with a matrix product of `dtype` and a copy."""
    return Environment(
        device=device.type,
        machine=machine(device),
        driver=driver(device),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        triton_version=version("triton"),
        commit=commit(),
        ceiling_tflops=_ceiling_tflops(device, dtype),
        ceiling_gbs=_ceiling_gbs(device),
    )


def available_memory_mib() -> float | None:
    """Memory that a new process may take without swapping, the control group's limit included; None where unknown."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    if found is None:
        return None
    limits = [int(found[1]) * 1024]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limits.append(
                int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text())
            )
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits) / 2**20


def _ceiling_tflops(device: torch.device, dtype: str) -> float:
    size = CEILING_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / (latency(Work(lambda _: a @ b), device).p50_ms * 1e-3) / 1e12


def _ceiling_gbs(device: torch.device) -> float:
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (latency(Work(lambda _: target.copy_(source)), device).p50_ms * 1e-3) / 1e9
