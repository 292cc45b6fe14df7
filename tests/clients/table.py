"""All clients, those of one kind, and how one is asked for by its name."""

import pytest

from . import of_diffusers, of_lucidrains, of_timm, of_torch, of_transformers, of_xformers

CLIENTS = [
    client
    for module in (of_timm, of_diffusers, of_transformers, of_torch, of_xformers, of_lucidrains)
    for client in module.CLIENTS
]
BY_NAME = {client.name: client for client in CLIENTS}


def each(*names: str) -> pytest.MarkDecorator:
    """Runs a test with these clients, or with all."""
    chosen = [BY_NAME[name] for name in names] if names else CLIENTS
    return pytest.mark.parametrize("client", chosen, ids=lambda client: client.name)
