"""What every test runs under: one thread, poisoned fresh memory, one hypothesis profile, no gpu tests without a GPU.

`--tier fast` is what `make test` runs: the part of the long tests that tests/tiers.py chooses. `--tier clients` is what
`make test-clients` runs, and no other tier does: networks of other packages.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from flashjvp import environment
from tests import tiers

# One profile everywhere: hypothesis' own CI profile would make `CI=true` change what is run.
# The machine may be loaded, so nothing is judged by how long it took.
settings.register_profile(
    "flashjvp", deadline=None, derandomize=False, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("flashjvp")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
    from verify.emulator import interpreter  # imports Triton

    interpreter.hasten()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=("fast", "all", "clients"), default="all", help="fast: a part of the long tests")


def pytest_configure(config: pytest.Config) -> None:
    tiers.is_fast = config.getoption("--tier") == "fast"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.getoption("--tier")
    _leave_out(config, items, {item.nodeid for item in items if (tier == "clients") != _is_of_clients(item)})
    if tiers.is_fast:
        _leave_out(config, items, tiers.left_out(items))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none"))


def _is_of_clients(item: pytest.Item) -> bool:
    return item.get_closest_marker("clients") is not None


def _leave_out(config: pytest.Config, items: list[pytest.Item], names: set[str]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in names])
    items[:] = [item for item in items if item.nodeid not in names]


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


@pytest.fixture
def sampled() -> Callable[..., list[str]]:
    """For a test over a list of names: in the fast tier one in `of` of them, as the mark of this name, else all."""

    def chosen(names: list[str], of: int) -> list[str]:
        return tiers.sample(names, of, tiers.commit()) if tiers.is_fast else names

    return chosen


@pytest.fixture
def machine() -> Iterator[Callable[..., None]]:
    """Stands for another machine: `machine(capability=(8, 6), has_triton=False)` answers for flashjvp.environment.

    Each keyword is a function of that module, which returns the value from then on.
    """
    with pytest.MonkeyPatch.context() as patch:

        def become(**answers: object) -> None:
            for name, answer in answers.items():
                patch.setattr(environment, name, lambda *_, answer=answer: answer)
            environment.forget()

        yield become
    environment.forget()
