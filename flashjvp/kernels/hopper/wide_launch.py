"""Launches of the warp-specialised kernels at head dims above 128, of calls with tangents (eligibility.py)."""

from typing import Any

from torch import Tensor

from ...layout import empty_lse, empty_rows, empty_statistic
from ...operands import Inputs
from ..launch import schedule
from ..launch.call import Call, Maybe
from ..launch.hopper_tables import Families
from . import launch
from .absent import unwanted, with_zeros, zero
from .backward_preprocess import launch_preprocess
from .bias import bias_of_call
from .descriptors import statistics_descriptor
from .launch import described
from .packed_mask import pack
from .per_tensor_scaling import KernelOperands
from .wide_backward_key import wide_backward_key_kernel
from .wide_backward_query import wide_backward_query_kernel
from .wide_backward_value import wide_backward_value_kernel
from .wide_forward import wide_forward_kernel

ROWS = 64  # of a program
DENSE_FORWARD = 160  # up to which two accumulators of 64 rows fit the registers of a warpgroup: forward.py


def forward(call: Call, inputs: Inputs, scale: float) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """o, o_t, lse and mu."""
    if call.width <= DENSE_FORWARD:
        return launch.forward(call, inputs, scale)
    tile = _tiles(call)["forward"]
    width = inputs.v.shape[-1]
    o, o_t = empty_rows(inputs.q, width), empty_rows(inputs.q, width)
    lse, mu = empty_lse(inputs.q, call.mask_tensor), empty_statistic(inputs.q)
    q, k, v, q_t, k_t, v_t = with_zeros(inputs)
    resident, streamed = described(call, ROWS, q, q_t), described(call, tile.block_rows, k, v, k_t, v_t)
    words, (bias, layout) = pack(call, True, False), bias_of_call(call)
    args = (*resident, *streamed, *described(call, ROWS, o, o_t), lse, mu, words.by_keys, bias)
    flags: dict[str, Any] = {"STAGES": tile.stages, "VARIES": words.varies, "BIAS_LAYOUT": layout}
    call.launch(wide_forward_kernel, "forward", call.query_programs(ROWS), args, scale, **flags)
    return o, o_t, lse, mu


def backward(
    call: Call, inputs: Inputs, cotangents: tuple[Maybe, Maybe], results: tuple[Maybe, ...], scale: float,
    wanted: Inputs,
) -> Inputs:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t. `results` are o, o_t, lse and mu."""
    (G, T), (o, o_t, lse, mu) = cotangents, results
    assert T is not None and o is not None and lse is not None
    stats, log_l = launch_preprocess(KernelOperands(call, inputs, cotangents), o, o_t, lse, mu)
    of_queries, of_values, of_keys = wanted.q or wanted.q_t, wanted.v or wanted.v_t, wanted.k or wanted.k_t
    grads = Inputs(*[empty_rows(x, x.shape[-1]) if want else None for x, want in zip(inputs, wanted, strict=True)])
    nobody = unwanted(inputs.q)
    d_q, d_k, d_v, d_q_t, d_k_t, d_v_t = [nobody if x is None else x for x in grads]
    q, k, v, q_t, k_t, v_t = with_zeros(inputs)
    G = zero(T) if G is None else G
    tiles = _tiles(call)
    words, (bias, layout) = pack(call, of_queries, of_keys or of_values), bias_of_call(call)

    def run(
        kernel: Any, family: str, resident: tuple[Maybe, ...], streamed: tuple[Maybe, ...], outs: tuple[Maybe, ...]
    ) -> None:
        tile, by_keys = tiles[family], family != "backward_query"
        programs = call.key_programs(ROWS) if by_keys else call.query_programs(ROWS)  # mutate: programs
        tiles_of_stats = statistics_descriptor(stats, tile.block_rows) if by_keys else stats
        rows, streamed_rows = described(call, ROWS, *resident), described(call, tile.block_rows, *streamed)
        mask = words.by_queries if by_keys else words.by_keys  # mutate: mask
        args = (*rows, *streamed_rows, tiles_of_stats, *described(call, ROWS, *outs), mask, bias, log_l)
        flags: dict[str, Any] = {"STAGES": tile.stages, "VARIES": words.varies, "BIAS_LAYOUT": layout}
        # Kernels that read nothing of the one before start early if that one has waited for the statistics.
        call.launch(kernel, family, programs, args, scale, launch_pdl=bool(of_keys), **flags)

    if of_keys:
        run(wide_backward_key_kernel, "backward_key", (k, v, k_t, v_t), (q, G, q_t, T), (d_k, d_k_t))
    if of_values:
        run(wide_backward_value_kernel, "backward_value", (k, k_t), (q, G, q_t, T), (d_v, d_v_t))
    if of_queries:
        run(wide_backward_query_kernel, "backward_query", (q, G, q_t, T), (k, v, k_t, v_t), (d_q, d_q_t))
    return grads


def _tiles(call: Call) -> Families:
    """The tile of each family that serves the head dim."""
    return schedule.pipelines(call.device, call.precision, call.width)["tangents"]
