"""Finds calls of torch's own layer_norm and batch_norm.

Reverse mode through their JVP is silently wrong (docs/layer-norm-jvp.md), so a network that is trained through its JVP
may not call them. The operators that are dispatched are looked at. So the name (nn.LayerNorm, F.layer_norm,
torch.layer_norm), the transform, and forward or backward make no difference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WRONG = ("layer_norm", "batch_norm")


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WRONG):
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def stock_norms() -> Iterator[set[str]]:
    """A set that fills with the names of the operators called inside."""
    with _Seen() as seen:
        yield seen.found
