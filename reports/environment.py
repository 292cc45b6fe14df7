"""Where and when rows were measured: the machine, versions, commit and time that every row carries."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
# Where rows go unless a command is told otherwise: an installed package keeps none beside itself.
DATA = ROOT / "reports" / "data" if IS_CHECKOUT else Path("flashjvp-data")


def now() -> str:
    """The time in UTC: "2025-01-31T12:00:00Z"."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def slug(name: str) -> str:
    """A machine's name as a folder name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(device: torch.device) -> str:
    """The GPU's name, or the CPU's and how many of its cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model} ({cores()} CPUs)"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver(device: torch.device) -> str:
    """The version of the GPU's driver; "none" on a CPU."""
    if device.type != "cuda":
        return "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.split("\n")[0].strip()


def version(package: str) -> str:
    """The installed version of a package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit of the checkout, marked when files other than the data that measurements write differ from it.

    Of an installed package it is the version.

    The variable GIT_COMMIT, where it is set, says it instead, for a tree that was copied without its repository;
    "unknown" is neither.
    """
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    if not IS_CHECKOUT:
        return version("flashjvp")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--", ".", ":!reports/data") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
