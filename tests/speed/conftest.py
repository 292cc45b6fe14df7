import pytest


@pytest.fixture
def poisoned_memory() -> None:
    """Fresh memory is as the allocator gives it: filling it with NaN, as in the other tests, would be timed, too."""
