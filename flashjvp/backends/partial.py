"""Windows and block masks as backends that are built on others, which are told what a query sees (patterns.py).

The name of one has all of it: "window:LEFT:RIGHT:LOCAL", with -1 where a side is not bounded, and "blocks:LOCAL". Under
the latter the plan of the block mask (block_plan.py) comes in the place of the mask.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from ..operands import RECORDS
from . import select
from .patterns import Band, Blocks, Listed

Maybe = Tensor | None
Masks = tuple[Maybe, Any]
"""The mask, and the pattern, that a local backend is given."""


class _Partial:
    """Has the four functions of a backend (backends/reference.py)."""

    def __init__(self, local: str) -> None:
        self._local = None if local == "best" else local
        self.forward, self.forward_jvp, self.backward, self.backward_jvp = (
            _Function(self.ends_in, name, record) for name, record in RECORDS.items()
        )

    def ends_in(self, name: str, x: Any, options: tuple[Any, ...]) -> tuple[Any, Any, tuple[Any, ...]]:
        """The local backend's function that a call of tensors x and options comes to, and what it is given."""
        is_causal, scale, dropout_p, *wanted = options
        local = select.resolve(self._local, x.q.device, x.q.dtype, select.is_wide(x.q, x.v))
        mask, pattern = self._masks(local, x.q, x.k, x.mask, is_causal)
        return getattr(local, name), x._replace(mask=mask), (False, scale, dropout_p, *wanted, pattern)

    def _masks(self, local: ModuleType, q: Tensor, k: Tensor, mask: Maybe, is_causal: bool) -> Masks:
        raise NotImplementedError


class _Function:
    """One of them, which can be bound where that of the local backend can (kernels/launch/replay.py)."""

    def __init__(self, ends_in: Callable[..., Any], name: str, record: Any) -> None:
        self._ends_in, self._name, self._record = ends_in, name, record

    def __call__(self, *args: Any) -> Any:
        count = len(self._record._fields)
        function, x, options = self._ends_in(self._name, self._record._make(args[:count]), args[count:])
        return function(*x, *options)

    def bind(self, operands: Any, options: tuple[Any, ...]) -> Any:
        """What takes the tensors alone, if the local function takes them as they are; else None."""
        function, x, options = self._ends_in(self._name, operands, options)
        bind = getattr(function, "bind", None)
        return None if bind is None or x.mask is not operands.mask else bind(x, options)


class _Window(_Partial):
    def __init__(self, rest: str) -> None:
        left, right, local = rest.split(":")
        super().__init__(local)
        self._left, self._right = int(left), int(right)

    def _masks(self, local: ModuleType, q: Tensor, k: Tensor, mask: Maybe, is_causal: bool) -> Masks:
        return mask, band(self._left, self._right, q.shape[-2], k.shape[-2], is_causal)


class _Blocks(_Partial):
    def _masks(self, local: ModuleType, q: Tensor, k: Tensor, mask: Maybe, is_causal: bool) -> Masks:
        assert mask is not None
        if any(size != 1 for size in mask.shape[:-1]):
            came = f"shape {list(mask.shape[:-1])} of them"
            raise UnsupportedError(f"attn_mask: expected one block mask for all entries of a mapped dim, got {came}")
        plan = mask if mask.ndim == 1 else mask.view(-1)
        if local.__name__.endswith(".triton"):
            return plan, Listed()
        return None, Blocks(plan, q.shape[-2], k.shape[-2])


def band(left: int, right: int, queries: int, keys: int, is_causal: bool) -> Band:
    """The differences n - m that a window allows, of those that there are; -1: any on this side."""
    shift = keys - queries  # mutate: shift
    low = max(shift - left, -queries) if left >= 0 else -queries
    high = min(shift + right, keys) if right >= 0 else keys
    return Band(low, min(high, 0) if is_causal else high)  # mutate: return Band


select.FAMILIES["window"] = _Window
select.FAMILIES["blocks"] = _Blocks
