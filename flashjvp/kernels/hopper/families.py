"""The kernels of a call by family, and what they are told of its mask."""

from typing import Any, NamedTuple

from ...backends.patterns import Listed
from ..launch.call import Call, Maybe
from .backward_key import backward_key_kernel
from .backward_one_pass import backward_one_pass_kernel
from .backward_pairs import backward_pairs_kernel
from .backward_query import backward_query_kernel
from .backward_value import backward_value_kernel
from .band_backward import band_key_kernel, band_pairs_kernel, band_query_kernel, band_value_kernel
from .band_forward import band_forward_kernel
from .band_one_pass import band_one_pass_kernel
from .bias import bias_of_call
from .block_mask_backward import (
    block_mask_key_kernel,
    block_mask_pairs_kernel,
    block_mask_query_kernel,
    block_mask_value_kernel,
)
from .block_mask_forward import block_mask_forward_kernel
from .forward import forward_kernel
from .packed_mask import pack


class Kernels(NamedTuple):
    """The kernels of a call, by family. Where d_q is accumulated, `backward_key` does it."""

    forward: Any
    backward_query: Any
    backward_key: Any
    backward_value: Any
    backward_pairs: Any
    backward_one_pass: Any = None


DENSE = Kernels(
    forward_kernel, backward_query_kernel, backward_key_kernel, backward_value_kernel, backward_pairs_kernel,
    backward_one_pass_kernel,
)  # fmt: skip
BLOCK_MASK = Kernels(
    block_mask_forward_kernel, block_mask_query_kernel, block_mask_key_kernel, block_mask_value_kernel,
    block_mask_pairs_kernel,
)  # fmt: skip
BAND = Kernels(
    band_forward_kernel, band_query_kernel, band_key_kernel, band_value_kernel, band_pairs_kernel, band_one_pass_kernel
)


class Seen(NamedTuple):
    """The kernels of a call, and what they are told of its mask and of per-tensor scaling: their last arguments, for
    tiles [queries, keys] and for tiles [keys, queries], and constants."""

    kernels: Kernels
    by_keys: tuple[Any, ...]
    by_queries: tuple[Any, ...]
    flags: dict[str, Any]

    @classmethod
    def of(cls, call: Call, tensor_scales: Maybe, *log_l: Maybe, by_keys: bool, by_queries: bool) -> "Seen":
        """Packs a boolean mask in the layouts that are asked for. The plan of a block mask has both. Kernels of
        backward passes take `log_l`, too: there is one beside an additive mask."""
        if isinstance(call.pattern, Listed):
            return cls(BLOCK_MASK, call.plan, call.plan, {})
        if call.pattern is not None:
            return cls(BAND, call.plan, call.plan, {})
        words = pack(call, by_keys, by_queries)
        bias, layout = bias_of_call(call)
        rest = (bias, *log_l, tensor_scales)
        flags = {"VARIES": words.varies, "BIAS_LAYOUT": layout}
        return cls(DENSE, (words.by_keys, *rest), (words.by_queries, *rest), flags)  # mutate: return cls
