"""The checks of calls inside PyTorch, by the names that `python -m verify` and `verify faults` know them by.

Each takes the inputs of a call and a subject (the backend that is judged), and returns an Identity for each quantity
that it compares.
"""

from ..oracles.identities import Check
from .biases import broadcast_biases, learned_biases
from .compiled_duals import compiled_duals
from .distributed import divided
from .dropout import dropped
from .finite_masks import finite_masks
from .high import more_precise
from .masks import causal_biases
from .packed import packed
from .partial import block_masks, windows
from .repeated import repeated, stateless
from .threads import beside_other_threads
from .transforms import dual_level, func_grad, func_jvp, mapped, outer_level, second_order
from .vectorized import mapped_cotangents, vectorized_jacobians

SITUATIONS: dict[str, Check] = {
    "func.vjp-mapped": mapped_cotangents,
    "vectorized": vectorized_jacobians,
    "causal-bias": causal_biases,
    "learned-bias": learned_biases,
    "broadcast-bias": broadcast_biases,
    "dropout": dropped,
    "finite-masks": finite_masks,
    "threads": beside_other_threads,
    "compiled-duals": compiled_duals,
    "divided": divided,
    "packed": packed,
    "windows": windows,
    "block-masks": block_masks,
    "high": more_precise,
}
"""What may surround a call: `python -m verify` runs these too, on few cases."""
IN_PYTORCH: dict[str, Check] = {
    "func.jvp": func_jvp,
    "forward_ad": dual_level,
    "func.grad": func_grad,
    "outer-level": outer_level,
    "func.vmap": mapped,
    "stateless": stateless,
    "repeated": repeated,
    "second-order": second_order,
    **SITUATIONS,
}
"""All of them: compositions of transforms, repeated calls and situations."""
