"""The innermost backend, which computes a block of attention on one device: the one asked for, or the best there is."""

from types import ModuleType
from typing import Any

from torch import Tensor

from ..backends import select
from ..errors import UnsupportedError

NO_LEARNED_MASK = "attn_mask: expected one without gradient and tangent over several processes, got a learned one"


class Local:
    """The four functions of a backend, of the one that serves tensors of their device, dtype and head dim."""

    def __init__(self, name: str | None) -> None:
        self._name = name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        """o and lse."""
        return self._backend(q, v).forward(q, k, v, *rest)

    def forward_jvp(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        """o, o_t, lse and mu."""
        return self._backend(q, v).forward_jvp(q, k, v, *rest)

    def backward(self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        """The wanted ones of d_q, d_k, d_v, d_mask."""
        return self._backend(q, v).backward(d_o, q, k, v, *rest)

    def backward_jvp(self, d_o: Any, d_o_t: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, d_mask, d_mask_t."""
        return self._backend(q, v).backward_jvp(d_o, d_o_t, q, k, v, *rest)

    def _backend(self, q: Tensor, v: Tensor) -> ModuleType:
        return select.resolve(self._name, q.device, q.dtype, select.is_wide(q, v))


def refuse_tangent_of_mask(mask_t: Tensor | None) -> None:
    """A mask that is dual inside a compiled function, which checks of Python did not see."""
    if mask_t is not None:
        raise UnsupportedError(NO_LEARNED_MASK)
