"""Which calls the warp-specialised kernels serve, and their launches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layout import empty_rows, empty_statistic
from .. import schedule
from ..launch import Call, Maybe
from ..pipelines import Pipeline
from .backward_key import backward_key_kernel
from .backward_query import backward_query_kernel
from .backward_value import backward_value_kernel
from .descriptors import rows_descriptor, statistics_descriptor
from .forward import forward_kernel
from .statistics import launch_query_sums, launch_statistics

OWN = 128  # rows of a program
HALF = OWN // 2  # and of each of its consumers


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
    tile = _required(call, "forward", jvp)
    o, lse = empty_rows(q, v.shape[-1]), empty_statistic(q)
    o_t, mu = (empty_rows(q, v.shape[-1]), empty_statistic(q)) if jvp else (None, None)
    args = (
        *_described(HALF, q, q_t), *_described(tile.rows, k, v, k_t, v_t), *_described(HALF, o, o_t), lse, mu,
    )  # fmt: skip
    call.launch_pipeline(forward_kernel, "forward", _query_programs(call), args, scale, JVP=jvp, STAGES=tile.stages)
    return o, o_t, lse, mu


def backward(
    call: Call, inputs: tuple[Maybe, ...], cotangents: tuple[Tensor, Maybe], results: tuple[Maybe, ...], scale: float
) -> tuple[Maybe, ...]:
    """d_q, d_k, d_v, d_q_t, d_k_t, d_v_t; the last three None without tangents. `results` are o, o_t, lse and mu.

    Query gradients take a kernel of their own where sums in any order are not faster, or not allowed: in PyTorch's
    deterministic mode.
    """
    d_o, d_o_t = cotangents
    o, o_t, lse, mu = results
    assert o is not None and lse is not None
    jvp = d_o_t is not None
    stats = launch_statistics(call, d_o, d_o_t, o, o_t, lse, mu)
    grads = [None if x is None else empty_rows(x, x.shape[-1]) for x in inputs]
    sums = None if torch.are_deterministic_algorithms_enabled() else _pipeline(call, "backward_key_sums", jvp)
    _backward_keys(call, (*inputs, *cotangents), stats, grads, scale, sums)
    if sums is None:
        _backward_queries(call, (*inputs, *cotangents), stats, grads, scale)
    return tuple(grads)


def _backward_keys(
    call: Call, inputs: tuple[Maybe, ...], stats: Tensor, grads: Sequence[Maybe], scale: float, sums: Pipeline | None
) -> None:
    """Writes d_k, d_v, d_k_t, d_v_t and, with the tile for `sums`, d_q and d_q_t."""
    q, k, v, q_t, k_t, v_t, d_o, d_o_t = inputs
    d_q, d_k, d_v, d_q_t, d_k_t, d_v_t = grads
    jvp = d_o_t is not None
    apart = _pipeline(call, "backward_value", jvp)
    outs = (d_k, None, d_k_t, None) if apart is not None else (d_k, d_v, d_k_t, d_v_t)
    tile = sums or _required(call, "backward_key", jvp)
    added: list[Maybe] = [None, None]
    if sums is not None:
        tiles = call.programs * call.sizes[2] * -(-call.sizes[0] // tile.rows)
        added = [None if x is None else stats.new_zeros(tiles, call.width, tile.rows) for x in (d_q, d_q_t)]
    streamed = (*_described(tile.rows, q, d_o, q_t, d_o_t), statistics_descriptor(stats, tile.rows))
    args = (*_described(HALF, k, v, k_t, v_t), *streamed, *_described(HALF, *outs), *added)
    flags = {"JVP": jvp, "VALUES": apart is None, "QUERIES": sums is not None, "STAGES": tile.stages, "HELD": tile.held}
    call.launch_pipeline(
        backward_key_kernel, "backward_key", _key_programs(call), args, scale, launch_pdl=True, **flags
    )  # fmt: skip
    if apart is not None:
        tile = apart
        streamed = (*_described(tile.rows, q, d_o, q_t, d_o_t), statistics_descriptor(stats, tile.rows))
        args = (*_described(HALF, k, k_t), *streamed, *_described(HALF, d_v, d_v_t))
        programs, flags = _key_programs(call), {"STAGES": tile.stages}
        call.launch_pipeline(backward_value_kernel, "backward_value", programs, args, scale, launch_pdl=True, **flags)
    if added[0] is not None and d_q is not None:
        launch_query_sums(call, added[0], added[1], d_q, d_q_t, scale)


def _backward_queries(
    call: Call, inputs: tuple[Maybe, ...], stats: Tensor, grads: Sequence[Maybe], scale: float
) -> None:
    """Writes d_q and d_q_t."""
    q, k, v, q_t, k_t, v_t, d_o, d_o_t = inputs
    jvp = d_o_t is not None
    tile = _required(call, "backward_query", jvp)
    own, streamed = _described(HALF, q, d_o, q_t, d_o_t), _described(tile.rows, k, v, k_t, v_t)
    args = (*own, *streamed, stats, *_described(HALF, grads[0], grads[3]))
    flags = {"JVP": jvp, "STAGES": tile.stages, "HELD": tile.held}
    call.launch_pipeline(
        backward_query_kernel, "backward_query", _query_programs(call), args, scale, launch_pdl=True, **flags
    )  # fmt: skip


def _pipeline(call: Call, family: str, jvp: bool) -> Pipeline | None:
    """The tile of a family, which a head dim may lack."""
    return schedule.pipelines(call.device, call.kind, call.width).get(family if jvp else family + "_plain")


def _required(call: Call, family: str, jvp: bool) -> Pipeline:
    tile = _pipeline(call, family, jvp)
    assert tile is not None, family
    return tile


def _described(rows: int, *tensors: Maybe) -> tuple[Any, ...]:
    """Descriptors of those tensors that there are."""
    return tuple([None if x is None else rows_descriptor(x, rows) for x in tensors])


def _query_programs(call: Call) -> int:
    return call.programs * call.sizes[2] * -(-call.sizes[0] // OWN)


def _key_programs(call: Call) -> int:
    return call.programs * call.kv_heads * -(-call.sizes[1] // OWN)
