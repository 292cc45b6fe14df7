"""Which calls the warp-specialised kernels serve, and their launches."""

from typing import Any

import torch
from torch import Tensor

from ...layout import empty_rows, empty_statistic
from .. import schedule
from ..launch import Call, Maybe
from .backward_key import backward_key_kernel
from .backward_query import backward_query_kernel
from .backward_value import backward_value_kernel
from .descriptors import rows_descriptor, statistics_descriptor
from .forward import forward_kernel
from .statistics import launch_query_sums, launch_statistics

OWN = 128  # rows of a program


def serves(call: Call, inputs: tuple[Maybe, ...], cotangents: tuple[Maybe, ...], scale: float) -> bool:
    """Whether the kernels are written for this call, whose head dims are padded to one that schedule.py names.

    `inputs` are q, k, v and, all or none, their tangents. One batch dim at most, head dims that need no padding, no
    mask, a positive scale, tensors that TMA can address.
    """
    complete = all(x is None for x in inputs[3:]) or all(x is not None for x in inputs[3:])
    whole = call.k_columns[0] == call.v_columns[0] == call.width
    if not complete or not whole or call.mask is not None or len(call.batch_shape) != 1 or not scale > 0:
        return False
    return all(x is None or fits(x) for x in (*inputs, *cotangents))


def fits(x: Tensor) -> bool:
    """Whether TMA can address a tensor's rows: aligned to 16 bytes, unit column stride, no broadcast dims."""
    *outer, column = x.stride()
    return column == 1 and x.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in outer
    )  # fmt: skip


def forward(call: Call, inputs: tuple[Maybe, ...], scale: float) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """o, o_t, lse and mu (o_t and mu None without tangents)."""
    q, k, v, q_t, k_t, v_t = inputs
    assert q is not None and v is not None
    jvp = q_t is not None
    rows, stages = _pipeline(call, "forward", jvp)
    o, lse = empty_rows(q, v.shape[-1]), empty_statistic(q)
    o_t, mu = (empty_rows(q, v.shape[-1]), empty_statistic(q)) if jvp else (None, None)
    args = (
        *_described(OWN // 2, q, q_t), *_described(rows, k, v, k_t, v_t), *_described(OWN // 2, o, o_t), lse, mu,
    )  # fmt: skip
    call.launch_pipeline(forward_kernel, "forward", _query_programs(call), args, scale, JVP=jvp, STAGES=stages)
    return o, o_t, lse, mu


def backward(
    call: Call, inputs: tuple[Maybe, ...], cotangents: tuple[Tensor, Maybe], results: tuple[Maybe, ...], scale: float
) -> tuple[Maybe, ...]:
    """d_q, d_k, d_v, d_q_t, d_k_t, d_v_t; the last three None without tangents. `results` are o, o_t, lse and mu.

    In deterministic mode of PyTorch, query gradients take a kernel of their own in place of sums in any order.
    """
    q, k, v, q_t, k_t, v_t = inputs
    d_o, d_o_t = cotangents
    o, o_t, lse, mu = results
    assert q is not None and k is not None and o is not None and lse is not None
    jvp = d_o_t is not None
    stats = launch_statistics(call, d_o, d_o_t, o, o_t, lse, mu)
    grads = [None if x is None else empty_rows(x, x.shape[-1]) for x in inputs]
    d_q, d_k, d_v, d_q_t, d_k_t, d_v_t = grads
    ordered = torch.are_deterministic_algorithms_enabled()
    together = not jvp or call.width < OWN  # else four accumulators do not fit the registers

    rows, stages = _pipeline(call, "backward_key", jvp)
    streamed = (*_described(rows, q, d_o, q_t, d_o_t), statistics_descriptor(stats, rows))
    tiles = call.programs * call.sizes[2] * -(-call.sizes[0] // rows)
    sums = [None if ordered or x is None else stats.new_zeros(tiles, call.width, rows) for x in (q, q_t)]
    outs = (d_k, d_v if together else None, d_k_t, d_v_t if together else None)
    args = (*_described(OWN // 2, k, v, k_t, v_t), *streamed, *_described(OWN // 2, *outs), *sums)
    flags = {"JVP": jvp, "VALUES": together, "QUERIES": not ordered}
    call.launch_pipeline(backward_key_kernel, "backward_key", _key_programs(call), args, scale, STAGES=stages, **flags)
    if not together:
        rows, stages = _pipeline(call, "backward_value", jvp)
        streamed = (*_described(rows, q, d_o, q_t, d_o_t), statistics_descriptor(stats, rows))
        args = (*_described(OWN // 2, k, k_t), *streamed, *_described(OWN // 2, d_v, d_v_t))
        call.launch_pipeline(backward_value_kernel, "backward_value", _key_programs(call), args, scale, STAGES=stages)
    if ordered:
        rows, stages = _pipeline(call, "backward_query", jvp)
        own = _described(OWN // 2, q, d_o, q_t, d_o_t)
        args = (*own, *_described(rows, k, v, k_t, v_t), stats, *_described(OWN // 2, d_q, d_q_t))
        call.launch_pipeline(
            backward_query_kernel, "backward_query", _query_programs(call), args, scale, STAGES=stages, JVP=jvp
        )
    else:
        assert sums[0] is not None and d_q is not None
        launch_query_sums(call, sums[0], sums[1], d_q, d_q_t, scale)
    return tuple(grads)


def _pipeline(call: Call, family: str, jvp: bool) -> tuple[int, int]:
    """Streamed rows of a tile, and tiles of the ring."""
    return schedule.pipelines(call.device, call.kind, call.width)[family if jvp else family + "_plain"]


def _described(rows: int, *tensors: Maybe) -> tuple[Any, ...]:
    """Descriptors of those tensors that there are."""
    return tuple([None if x is None else rows_descriptor(x, rows) for x in tensors])


def _query_programs(call: Call) -> int:
    return call.programs * call.sizes[2] * -(-call.sizes[0] // OWN)


def _key_programs(call: Call) -> int:
    return call.programs * call.kv_heads * -(-call.sizes[1] // OWN)
