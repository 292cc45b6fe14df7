"""Where a sweep runs: machine, versions, commit, and the device's own ceiling, measured in the same run."""

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import DTYPES
from .measure import latency

ROOT = Path(__file__).resolve().parents[1]
CEILING_SIZE = {"cpu": 1024, "cuda": 8192}


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


def describe(device: torch.device, dtype: str) -> Environment:
    """The environment of a sweep on `device`; runs a matrix product of `dtype` for the ceiling."""
    return Environment(
        device=device.type,
        machine=_machine(device),
        driver=_driver() if device.type == "cuda" else "none",
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        triton_version=_version("triton"),
        commit=_commit(),
        ceiling_tflops=_ceiling_tflops(device, dtype),
    )


def slug(name: str) -> str:
    """A machine's name as a folder name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model} ({cores} CPUs)"


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit of the checkout, marked when files other than the data that sweeps write differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--", ".", ":!reports/data") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _ceiling_tflops(device: torch.device, dtype: str) -> float:
    size = CEILING_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / (latency(lambda: a @ b, device).p50_ms * 1e-3) / 1e12
