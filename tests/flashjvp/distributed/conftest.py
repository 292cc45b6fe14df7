"""The processes that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.flashjvp.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()
