"""Launches of the warp-specialised kernels, of calls that they serve (eligibility.py)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import empty_lse, empty_statistic
from ...operands import Inputs
from ..launch import schedule
from ..launch.call import Call, Maybe
from ..launch.hopper_tables import Families, Persistent, Pipeline
from . import eligibility
from .absent import with_unwanted, with_zeros, zero
from .backward_postprocess import dq_columns, launch_postprocess
from .backward_preprocess import launch_preprocess
from .described import describe, described, empty_result, value_widths, written
from .descriptors import statistics_descriptor
from .families import Seen
from .per_tensor_scaling import KernelOperands, scale_tensors
from .persistent_launch import launch_persistent, persistent_of

DqAccum = tuple[Tensor, Tensor]  # of d_q / c and d_q_t / c

BLOCK_ROWS = 128  # rows of a program
CONSUMER_ROWS = BLOCK_ROWS // 2  # and of each of its consumers
PAIRS_WIDTH = 128  # at this padded head dim two streamed tensors share a tile; at 64 `in_pairs` says where


def forward(call: Call, inputs: Inputs, scale: float) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """o, o_t, lse and mu (o_t and mu None without tangents)."""
    like, jvp = inputs.q, any(x is not None for x in (inputs.q_t, inputs.k_t, inputs.v_t))
    width = inputs.v.shape[-1]
    given = _as_read(call, inputs, (), scale)
    call, (q, k, v, q_t, k_t, v_t) = given.call, with_zeros(given.inputs) if jvp else given.inputs
    persistent = persistent_of(call, jvp, "forward", given.tensor_scales is not None)
    tile = persistent.pipeline if persistent else _pipelines(call, jvp)["forward"]
    kind = like.dtype if given.tensor_scales is None else torch.float32  # mutate: kind
    o, lse = empty_result(call, like, width, kind), empty_lse(like, call.mask_tensor)
    o_t, mu = (empty_result(call, like, width, kind), empty_statistic(like)) if jvp else (None, None)
    widths = value_widths(given)
    resident, outs = described(call, CONSUMER_ROWS, q, q_t), written(given, o, o_t, widths=widths)
    keys = described(call, tile.block_rows, k, k_t)
    values = described(call, tile.block_rows, v, v_t, widths=widths)
    args: tuple[Any, ...] = (*resident, *keys[:2], *values[:2], *keys[2:], *values[2:], *outs, lse, mu)
    if persistent:
        launch_persistent(call, "forward", persistent, args, scale)
        return o, o_t, lse, mu
    seen = Seen.of(call, given.tensor_scales, by_keys=True, by_queries=False)
    args = (*args, *seen.by_keys)
    flags: dict[str, Any] = {"JVP": jvp, "STAGES": tile.stages, "REGISTER_OPERANDS": tile.register_operands}
    programs = call.query_programs(BLOCK_ROWS)
    call.launch(seen.kernels.forward, call.family("forward"), programs, args, scale, **flags, **seen.flags)
    return o, o_t, lse, mu


def backward(
    call: Call, inputs: Inputs, cotangents: tuple[Maybe, Maybe], results: tuple[Maybe, ...], scale: float,
    wanted: Inputs,
) -> Inputs:  # fmt: skip
    """The wanted ones of d_q, d_k, d_v, d_q_t, d_k_t, d_v_t. `results` are o, o_t, lse and mu.

    A head dim without registers for four accumulators has `backward_value`, or for calls of half types without a mask
    `backward_one_pass`. Where d_q and d_q_t are accumulated, the kernel of d_k and d_k_t does so, in float32 and in any
    order.
    """
    o, o_t, lse, mu = results
    assert o is not None and lse is not None
    in_one_pass = eligibility.in_one_pass(call)
    given = _as_read(call, inputs, cotangents, scale)
    call, (d_o, d_o_t) = given.call, given.cotangents
    stats, log_l = launch_preprocess(given, o, o_t, lse, mu)
    jvp = d_o_t is not None
    tiles = _pipelines(call, jvp)
    of_queries, of_values, of_keys = wanted.q or wanted.q_t, wanted.v or wanted.v_t, wanted.k or wanted.k_t
    in_one_pass = in_one_pass and of_keys and of_values
    in_one_pass = in_one_pass and "backward_one_pass" in tiles
    may_sum = of_queries and of_keys and eligibility.may_accumulate_dq(call, in_one_pass)
    family, summed = schedule.key_side_pipeline(tiles, call.width, call.sizes.queries, may_sum, in_one_pass)
    apart = "backward_value" in tiles and family != "backward_one_pass"
    by_keys = of_queries and not summed
    seen = Seen.of(call, given.tensor_scales, log_l, by_keys=by_keys, by_queries=of_keys or of_values)
    asked = zip(inputs, wanted, strict=True)
    grads = Inputs(*[empty_result(call, x, x.shape[-1]) if want else None for x, want in asked])
    dq_accum = _zero_dq_accum(call, stats, tiles[family]) if summed else None
    if d_o_t is not None:
        given = given._replace(inputs=with_zeros(given.inputs), cotangents=(zero(d_o_t) if d_o is None else d_o, d_o_t))
    written_to = with_unwanted(inputs.q, grads, jvp)
    # Kernels that read nothing of the one before start early if that one has waited for the statistics.
    waited = of_keys or (of_values and not apart)
    work = _Backward(given, stats, seen, written_to, dq_accum, scale, waited)
    if family == "backward_one_pass":
        work.one_pass(tiles[family])
    elif family == "backward_pairs" and of_keys:
        work.pairs(tiles[family])
    elif waited:
        work.keys(family, tiles[family], not apart)
    if apart and of_values:
        work.values(tiles["backward_value"])
    if dq_accum is not None:
        launch_postprocess(call, dq_accum, grads.q, grads.q_t, given.tensor_scales, scale, family == "backward_pairs")
    elif of_queries:
        work.queries(tiles["backward_query"])
    return grads


def _zero_dq_accum(call: Call, stats: Tensor, tile: Pipeline) -> DqAccum:
    """Zeros, to which a kernel adds d_q / c and d_q_t / c, tile by tile."""
    count, size = call.query_programs(tile.block_rows), dq_columns(call) * tile.block_rows
    return stats.new_zeros(count, size), stats.new_zeros(count, size)


class _Backward(NamedTuple):
    """The launches of a backward pass, and what they share."""

    given: KernelOperands
    stats: Tensor
    seen: Seen
    grads: Inputs
    dq_accum: DqAccum | None
    scale: float
    waited: bool  # the kernel of the keys' gradients is launched, which waits for the statistics

    def one_pass(self, tile: Pipeline) -> None:
        """Writes d_k, d_k_t, d_v, d_v_t and, if there are accumulators of d_q and d_q_t, adds to those."""
        (q, k, v, q_t, k_t, v_t), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        _, d_k, d_v, _, d_k_t, d_v_t = self.grads
        resident = self._described(CONSUMER_ROWS, k, k_t, v, v_t)
        streamed = self._streamed(tile, q, q_t, d_o_t, d_o)
        outs = self._described(CONSUMER_ROWS, d_v, d_v_t, d_k, d_k_t)
        args = (*resident, *streamed, self._statistics(tile), *outs)
        flags: dict[str, Any] = {"STAGES": tile.stages}
        call = self.given.call
        if call.pattern is None:
            args = (*args, *(self.dq_accum or (None, None)))
            flags["DQ_COLUMNS"] = dq_columns(call) if self.dq_accum else 0
        else:
            args = (*args, *self.seen.by_queries)
        programs = call.key_programs(CONSUMER_ROWS)  # mutate: programs
        if call.sequences is not None:  # each of which has whole blocks
            programs = 2 * call.key_programs(BLOCK_ROWS)
        kernel = self.seen.kernels.backward_one_pass
        call.launch(
            kernel, call.family("backward_one_pass"), programs, args, self.scale, launch_pdl=True, **flags
        )  # fmt: skip

    def pairs(self, tile: Pipeline) -> None:
        """Writes d_k, d_k_t and, if there are accumulators of d_q and d_q_t, adds to those."""
        (q, k, v, q_t, k_t, v_t), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        streamed = self._streamed(tile, q, q_t, d_o_t, d_o)[::2]
        resident = self._described(CONSUMER_ROWS, k, v, k_t, v_t)[::2]
        outs = written(self.given, self.grads.k, self.grads.k_t)[::2]
        args = (*resident, *streamed, self._statistics(tile), *outs)
        flags = {"DQ_ACCUM": self.dq_accum is not None, "STAGES": tile.stages}
        self._of_keys(
            self.seen.kernels.backward_pairs, "backward_pairs", (*args, *(self.dq_accum or (None, None))), **flags
        )

    def keys(self, family: str, tile: Pipeline, values: bool) -> None:
        """Writes d_k, d_k_t and, with `values`, d_v, d_v_t; if there are accumulators, adds to those."""
        (q, k, v, q_t, k_t, v_t), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        _, d_k, d_v, _, d_k_t, d_v_t = self.grads
        persistent = self._chosen("backward_key") if values else None
        tile = persistent.pipeline if persistent else tile
        pairs = d_o_t is not None and eligibility.in_pairs(self.given.call)
        if pairs:  # ptxas overwrites a register operand that takes part in a single product
            tile = tile._replace(register_operands=0)
        outs = (d_k, d_v, d_k_t, d_v_t) if values else (d_k, None, d_k_t, None)
        resident, streamed = (
            self._described(CONSUMER_ROWS, k, v, k_t, v_t),
            self._described(tile.block_rows, q, d_o, q_t, d_o_t),
        )
        args = (*resident, *streamed, self._statistics(tile), *written(self.given, *outs))
        if persistent:
            self._persistent("backward_key", persistent._replace(pipeline=tile), args, PAIRS=pairs)
            return
        args = (*args, *(self.dq_accum or (None, None)))
        flags = {
            "JVP": d_o_t is not None, "WITH_DV": values,
            "DQ_COLUMNS": dq_columns(self.given.call) if self.dq_accum else 0, "STAGES": tile.stages,
            "REGISTER_OPERANDS": tile.register_operands, "SUB_TILES": tile.sub_tiles,
            "BUFFER_STAGES": tile.buffer_stages, "PAIRS": pairs,
        }  # fmt: skip
        self._of_keys(self.seen.kernels.backward_key, family, args, **flags)

    def values(self, tile: Pipeline) -> None:
        """Writes d_v and d_v_t."""
        (q, k, _, q_t, k_t, _), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        resident, streamed = (
            self._described(CONSUMER_ROWS, k, k_t),
            self._described(tile.block_rows, q, d_o, q_t, d_o_t),
        )
        args = (*resident, *streamed, self._statistics(tile), *written(self.given, self.grads.v, self.grads.v_t))
        self._of_keys(self.seen.kernels.backward_value, "backward_value", args, STAGES=tile.stages)

    def queries(self, tile: Pipeline) -> None:
        """Writes d_q and d_q_t."""
        (q, k, v, q_t, k_t, v_t), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        persistent = self._chosen("backward_query")
        tile = persistent.pipeline if persistent else tile
        resident = self._described(CONSUMER_ROWS, q, d_o, q_t, d_o_t)
        streamed = self._streamed(tile, k, v, k_t, v_t)
        outs = written(self.given, self.grads.q, self.grads.q_t)
        args = (*resident, *streamed, self.stats, *outs)
        if persistent:
            self._persistent("backward_query", persistent, args)
            return
        args = (*args, *self.seen.by_keys)
        flags = {"JVP": d_o_t is not None, "STAGES": tile.stages, "REGISTER_OPERANDS": tile.register_operands}
        programs = self.given.call.query_programs(BLOCK_ROWS)
        self._launch(self.seen.kernels.backward_query, "backward_query", programs, args, **flags)

    def _streamed(self, tile: Pipeline, *tensors: Maybe) -> tuple[Any, ...]:
        """Two descriptors of each tensor, as of `described`; where two share a tile, of pieces of its columns."""
        call = self.given.call
        if call.width != PAIRS_WIDTH or self.given.cotangents[1] is None or tile.register_operands:
            return self._described(tile.block_rows, *tensors)
        pieces = [describe(call)(x, tile.block_rows, (CONSUMER_ROWS,))[0] for x in tensors if x is not None]
        return tuple(x for piece in pieces for x in (piece, None))

    def _chosen(self, family: str) -> Persistent | None:
        given = self.given
        return persistent_of(given.call, given.cotangents[1] is not None, family, given.tensor_scales is not None)

    def _persistent(self, family: str, chosen: Persistent, args: tuple[Any, ...], **flags: Any) -> None:
        launch_persistent(self.given.call, family, chosen, args, self.scale, launch_pdl=self.waited, **flags)

    def _of_keys(self, kernel: Any, family: str, args: tuple[Any, ...], **flags: Any) -> None:
        self._launch(
            kernel, family, self.given.call.key_programs(BLOCK_ROWS), (*args, *self.seen.by_queries), **flags
        )  # mutate: self._launch

    def _launch(self, kernel: Any, family: str, programs: int, args: tuple[Any, ...], **flags: Any) -> None:
        call, flags = self.given.call, {**flags, **self.seen.flags}
        call.launch(kernel, call.family(family), programs, args, self.scale, launch_pdl=self.waited, **flags)

    def _described(self, rows: int, *tensors: Maybe) -> tuple[Any, ...]:
        return described(self.given.call, rows, *tensors)

    def _statistics(self, tile: Pipeline) -> Any:
        return statistics_descriptor(self.stats, tile.block_rows)


def _as_read(call: Call, inputs: Inputs, cotangents: tuple[Maybe, ...], scale: float) -> KernelOperands:
    """A call with the tensors as the kernels read them."""
    if call.precision == "tf32":
        return scale_tensors(call, inputs, cotangents, scale)
    return KernelOperands(call, inputs, cotangents)


def _pipelines(call: Call, jvp: bool) -> Families:
    """The tile of each family that serves the head dim, with or without tangents."""
    return schedule.pipelines(call.device, call.precision, call.width)["tangents" if jvp else "plain"]
