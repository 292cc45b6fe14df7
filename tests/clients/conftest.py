"""What tests of clients start from: the package is there, or stands in."""

import sys
from collections.abc import Iterator

import pytest

from tests.clients.of_xformers import stand_in_for_flash_attn


@pytest.fixture(autouse=True)
def packages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips where a client's package is missing; has something by the name of flash_attn for those that call it."""
    client = request.node.callspec.params.get("client") if hasattr(request.node, "callspec") else None
    if client is not None and not client.is_installed():
        pytest.skip(f"{client.package} is not installed")
    if client is not None and client.name.startswith("flash_attn"):
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in_for_flash_attn())
    yield
