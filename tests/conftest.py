"""What every test runs under: one thread, poisoned fresh memory, one hypothesis profile, no gpu tests without a GPU."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# One profile everywhere: hypothesis' own CI profile would make `CI=true` change what is run.
# The machine may be loaded, so nothing is judged by how long it took.
settings.register_profile(
    "flashjvp", deadline=None, derandomize=False, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("flashjvp")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory (torch.empty and its kin, on every device) holds NaN, so that a result never written shows.

    PyTorch fills memory only in deterministic mode; that mode only warns here, because cuBLAS would ask for a
    process-wide environment variable.
    """
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=warned)
