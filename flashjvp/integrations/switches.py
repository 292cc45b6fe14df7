"""Turns on the fused attention of models that have a switch for it (timm's `fused_attn`), while in a context."""

import threading
from typing import Any

from torch import nn

_LOCK = threading.Lock()
_HELD: dict[int, list[Any]] = {}  # by id of a module that is switched on: the module, how many contexts hold it


def switch_on(model: nn.Module) -> list[nn.Module]:
    """The modules of a model whose switch was off, or is held on by another context."""
    held = []
    with _LOCK:
        for module in model.modules():
            entry = _HELD.get(id(module))
            if entry is not None:
                entry[1] += 1
                held.append(module)
            elif getattr(module, "fused_attn", None) is False:
                module.fused_attn = True  # type: ignore[assignment]
                _HELD[id(module)] = [module, 1]
                held.append(module)
    return held


def switch_back(modules: list[nn.Module]) -> None:
    """As they were, where no other context holds them."""
    with _LOCK:
        for module in modules:
            entry = _HELD[id(module)]
            entry[1] -= 1
            if entry[1] == 0:
                del _HELD[id(module)]
                module.fused_attn = False  # type: ignore[assignment]
