"""How far rounding may move the results of a correct streaming kernel: the bounds that tolerance.py asks for.

propagation.py follows the variances of rounding errors through a kernel, in float64, and blocks.py adds those of a
sequence that is divided over processes; noise.py makes bounds of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cases.inputs import Inputs
from ..oracles.attention import QUERY_SIDE
from .blocks import Block, gradients, outputs
from .noise import Bound
from .propagation import StreamingKernel


def rounding_bounds(inputs: Inputs, blocks: Sequence[Block] = ()) -> dict[str, Bound]:
    """The absolute rounding bound of lse, mu and every output and gradient, also for those of absent tangents.

    `blocks`: the calls of a sequence that is divided over processes.
    """
    if inputs.q.numel() == 0 or inputs.k.numel() == 0:  # nothing is summed
        q, k, v = (x.new_zeros(x.shape[:-1], dtype=torch.float64) for x in (inputs.q, inputs.k, inputs.v))
        rows = {"o": q, "o_t": q, "d_q": q, "d_k": k, "d_v": v, "d_q_t": q, "d_k_t": k, "d_v_t": v, "lse": q, "mu": q}
        return {name: Bound(0.0, zeros) for name, zeros in rows.items()}
    kernel = StreamingKernel(inputs)
    if blocks:
        of_o, of_o_t = outputs(kernel, blocks)
        kernel.o, kernel.o_t = kernel.o.and_stored(of_o), kernel.o_t.and_stored(of_o_t)
    noises = {"o": kernel.o, "o_t": kernel.o_t, **kernel.gradients(), **kernel.statistics()}
    if blocks:
        noises |= {name: noises[name].and_stored(x) for name, x in gradients(kernel, blocks).items()}
    return {name: noise.bound() for name, noise in noises.items()}


def inner_product_bounds(inputs: Inputs, weights: dict[str, Tensor]) -> dict[str, float]:
    """How far roundings move sum(result * weight), for a weight of each named output or gradient."""
    if inputs.q.numel() == 0 or inputs.k.numel() == 0:  # nothing is summed
        return dict.fromkeys(weights, 0.0)
    kernel = StreamingKernel(inputs)
    noises = {"o": kernel.o, "o_t": kernel.o_t, **kernel.gradients()}
    return {name: noises[name].inner_product_bound(weight, name in QUERY_SIDE) for name, weight in weights.items()}
