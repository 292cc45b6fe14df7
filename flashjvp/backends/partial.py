"""Windows and block masks as backends that are built on others, which are told what a query sees (patterns.py).

The name of one has all of it: "window:LEFT:RIGHT:LOCAL", with -1 where a side is not bounded, and "blocks:LOCAL". Under
the latter the plan of the block mask (block_plan.py) comes in the place of the mask.
"""

from types import ModuleType
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from . import select
from .patterns import Band, Blocks, Listed

Maybe = Tensor | None
Masks = tuple[Maybe, Any]
"""The mask, and the pattern, that a local backend is given."""


class _Partial:
    """The four functions of a backend (backends/reference.py)."""

    def __init__(self, local: str) -> None:
        self._local = None if local == "best" else local

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, seed: Maybe, is_causal: bool, scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """o and lse."""
        local = self._chosen(q, v)
        mask, pattern = self._masks(local, q, k, mask, is_causal)
        results: tuple[Tensor, Tensor] = local.forward(q, k, v, mask, seed, False, scale, dropout_p, pattern)
        return results

    def forward_jvp(
        self, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, mask: Maybe, mask_t: Maybe,
        seed: Maybe, is_causal: bool, scale: float, dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """o, o_t, lse and mu."""
        local = self._chosen(q, v)
        mask, pattern = self._masks(local, q, k, mask, is_causal)
        results: tuple[Tensor, Tensor, Tensor, Tensor] = local.forward_jvp(
            q, k, v, q_t, k_t, v_t, mask, mask_t, seed, False, scale, dropout_p, pattern
        )
        return results

    def backward(
        self, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Maybe, seed: Maybe,
        is_causal: bool, scale: float, dropout_p: float, wanted: tuple[bool, bool, bool, bool],
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, d_mask."""
        local = self._chosen(q, v)
        mask, pattern = self._masks(local, q, k, mask, is_causal)
        grads: tuple[Maybe, ...] = local.backward(
            d_o, q, k, v, o, lse, mask, seed, False, scale, dropout_p, wanted, pattern
        )
        return grads

    def backward_jvp(
        self, d_o: Maybe, d_o_t: Maybe, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, o: Tensor,
        o_t: Maybe, lse: Tensor, mu: Tensor, mask: Maybe, mask_t: Maybe, seed: Maybe, is_causal: bool, scale: float,
        dropout_p: float, wanted: tuple[bool, ...],
    ) -> tuple[Maybe, ...]:  # fmt: skip
        """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t, d_mask, d_mask_t."""
        local = self._chosen(q, v)
        mask, pattern = self._masks(local, q, k, mask, is_causal)
        grads: tuple[Maybe, ...] = local.backward_jvp(
            d_o, d_o_t, q, k, v, q_t, k_t, v_t, o, o_t, lse, mu, mask, mask_t, seed, False, scale, dropout_p, wanted,
            pattern,
        )  # fmt: skip
        return grads

    def _chosen(self, q: Tensor, v: Tensor) -> ModuleType:
        return select.resolve(self._local, q.device, q.dtype, select.is_wide(q, v))

    def _masks(self, local: ModuleType, q: Tensor, k: Tensor, mask: Maybe, is_causal: bool) -> Masks:
        raise NotImplementedError


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
        plan = mask.view(-1)
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
