"""docs/models.md shows the table of clients as it is."""

from pathlib import Path

import pytest

from tests.clients.table import BY_NAME, CLIENTS

pytestmark = pytest.mark.clients
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_page_shows_every_client() -> None:
    shown = PAGE.read_text().partition("<!-- clients -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:]
    assert shown == [f"| {client.name} | {client.served} | {client.why} |" for client in CLIENTS]


def test_names_are_unique_and_reasons_are_given() -> None:
    assert len(BY_NAME) == len(CLIENTS)
    assert [client.name for client in CLIENTS if client.served != "flashjvp" and not client.why] == []
