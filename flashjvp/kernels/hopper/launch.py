"""Launches of the warp-specialised kernels, of calls that they serve (eligibility.py)."""

from typing import Any, NamedTuple

from torch import Tensor

from ...layout import empty_rows, empty_statistic
from ...operands import Inputs
from ..launch import schedule
from ..launch.call import Call, Maybe
from ..launch.hopper_tables import Families, Pipeline
from .backward_key import backward_key_kernel
from .backward_pairs import backward_pairs_kernel
from .backward_preprocess import launch_query_sums, launch_statistics, summed_columns
from .backward_query import backward_query_kernel
from .backward_value import backward_value_kernel
from .descriptors import rows_descriptors, statistics_descriptor
from .forward import forward_kernel
from .packed_mask import Bits, pack
from .per_tensor_scaling import KernelOperands, rescale

Sums = tuple[Tensor, Tensor]  # of d_q / c and d_q_t / c

OWN = 128  # rows of a program
HALF = OWN // 2  # and of each of its consumers


def forward(call: Call, inputs: Inputs, scale: float) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """o, o_t, lse and mu (o_t and mu None without tangents)."""
    like, given = inputs.q, _as_read(call, inputs, (), scale)
    call, (q, k, v, q_t, k_t, v_t) = given.call, given.inputs
    jvp = q_t is not None
    tile = _pipelines(call, jvp)["forward"]
    o, lse = empty_rows(like, like.shape[-1]), empty_statistic(like)
    o_t, mu = (empty_rows(like, like.shape[-1]), empty_statistic(like)) if jvp else (None, None)
    own, outs = _described(call, HALF, q, q_t), _written(given, o, o_t)
    bits = pack(call, by_keys=True, by_queries=False)
    args = (*own, *_described(call, tile.rows, k, v, k_t, v_t), *outs, lse, mu, bits.by_keys, given.factors)
    flags: dict[str, Any] = {"JVP": jvp, "STAGES": tile.stages, "HELD": tile.held, "VARIES": bits.varies}
    call.launch(forward_kernel, "forward", call.query_programs(OWN), args, scale, **flags)
    return o, o_t, lse, mu


def backward(
    call: Call, inputs: Inputs, cotangents: tuple[Tensor, Maybe], results: tuple[Maybe, ...], scale: float
) -> Inputs:
    """d_q, d_k, d_v, d_q_t, d_k_t, d_v_t; the last three None without tangents. `results` are o, o_t, lse and mu.

    A head dim without registers for four accumulators has `backward_value`. Where query gradients are summed,
    the kernel of d_k and d_k_t adds them up in float32, in any order.
    """
    o, o_t, lse, mu = results
    d_o, d_o_t = cotangents
    assert o is not None and lse is not None
    given = _as_read(call, inputs, cotangents, scale)
    call, (d_o, d_o_t) = given.call, given.cotangents
    assert d_o is not None
    stats = launch_statistics(call, d_o, d_o_t, o, o_t, lse, mu, given.factors)
    tiles = _pipelines(call, d_o_t is not None)
    family, summed = schedule.key_side_pipeline(tiles, call.width, call.sizes.queries)
    bits = pack(call, by_keys=not summed, by_queries=True)
    grads = Inputs(*[None if x is None else empty_rows(x, x.shape[-1]) for x in inputs])
    sums = _sums(call, stats, tiles[family]) if summed else None
    work = _Backward(given, stats, bits, grads, sums, scale)
    if family == "backward_pairs":
        work.pairs(tiles[family])
    else:
        work.keys(family, tiles[family], "backward_value" not in tiles)
    if "backward_value" in tiles:
        work.values(tiles["backward_value"])
    if sums is not None:
        launch_query_sums(call, sums, grads.q, grads.q_t, given.factors, scale)
    else:
        work.queries(tiles["backward_query"])
    return grads


def _sums(call: Call, stats: Tensor, tile: Pipeline) -> Sums:
    """Zeros, to which a kernel adds d_q / c and d_q_t / c, tile by tile."""
    count, size = call.query_programs(tile.rows), summed_columns(call) * tile.rows
    return stats.new_zeros(count, size), stats.new_zeros(count, size)


class _Backward(NamedTuple):
    """The launches of a backward pass, and what they share."""

    given: KernelOperands
    stats: Tensor
    bits: Bits
    grads: Inputs
    sums: Sums | None
    scale: float

    def pairs(self, tile: Pipeline) -> None:
        """Writes d_k, d_k_t and, if there are sums, adds to those."""
        (q, k, v, q_t, k_t, v_t), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        # Two tensors in a tile are copied in pieces of 64 columns.
        streamed = [rows_descriptors(x, tile.rows, (HALF,))[0] for x in (q, q_t, d_o_t, d_o) if x is not None]
        own = self._described(HALF, k, v, k_t, v_t)[::2]
        outs = _written(self.given, self.grads.k, self.grads.k_t)[::2]
        args = (*own, *streamed, self._statistics(tile), *outs)
        flags = {"QUERIES": self.sums is not None, "STAGES": tile.stages}
        self._of_keys(backward_pairs_kernel, "backward_pairs", (*args, *(self.sums or (None, None))), **flags)

    def keys(self, family: str, tile: Pipeline, values: bool) -> None:
        """Writes d_k, d_k_t and, with `values`, d_v, d_v_t; if there are sums, adds to those."""
        (q, k, v, q_t, k_t, v_t), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        _, d_k, d_v, _, d_k_t, d_v_t = self.grads
        outs = (d_k, d_v, d_k_t, d_v_t) if values else (d_k, None, d_k_t, None)
        own, streamed = self._described(HALF, k, v, k_t, v_t), self._described(tile.rows, q, d_o, q_t, d_o_t)
        written = _written(self.given, *outs)
        args = (*own, *streamed, self._statistics(tile), *written, *(self.sums or (None, None)))
        flags = {
            "JVP": d_o_t is not None, "VALUES": values, "QUERIES": summed_columns(self.given.call) if self.sums else 0,
            "STAGES": tile.stages, "HELD": tile.held, "PARTS": tile.parts, "SLOTS": tile.slots,
        }  # fmt: skip
        self._of_keys(backward_key_kernel, family, args, **flags)

    def values(self, tile: Pipeline) -> None:
        """Writes d_v and d_v_t."""
        (q, k, _, q_t, k_t, _), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        own, streamed = self._described(HALF, k, k_t), self._described(tile.rows, q, d_o, q_t, d_o_t)
        args = (*own, *streamed, self._statistics(tile), *_written(self.given, self.grads.v, self.grads.v_t))
        self._of_keys(backward_value_kernel, "backward_value", args, STAGES=tile.stages)

    def queries(self, tile: Pipeline) -> None:
        """Writes d_q and d_q_t."""
        (q, k, v, q_t, k_t, v_t), (d_o, d_o_t) = self.given.inputs, self.given.cotangents
        own, streamed = self._described(HALF, q, d_o, q_t, d_o_t), self._described(tile.rows, k, v, k_t, v_t)
        args = (*own, *streamed, self.stats, *_written(self.given, self.grads.q, self.grads.q_t), self.bits.by_keys)
        flags = {"JVP": d_o_t is not None, "STAGES": tile.stages, "HELD": tile.held}
        self._launch(backward_query_kernel, "backward_query", self.given.call.query_programs(OWN), args, **flags)

    def _of_keys(self, kernel: Any, family: str, args: tuple[Any, ...], **flags: Any) -> None:
        self._launch(kernel, family, self.given.call.key_programs(OWN), (*args, self.bits.by_queries), **flags)

    def _launch(self, kernel: Any, family: str, programs: int, args: tuple[Any, ...], **flags: Any) -> None:
        flags["VARIES"] = self.bits.varies
        args = (*args, self.given.factors)
        self.given.call.launch(kernel, family, programs, args, self.scale, launch_pdl=True, **flags)

    def _described(self, rows: int, *tensors: Maybe) -> tuple[Any, ...]:
        return _described(self.given.call, rows, *tensors)

    def _statistics(self, tile: Pipeline) -> Any:
        return statistics_descriptor(self.stats, tile.rows)


def _as_read(call: Call, inputs: Inputs, cotangents: tuple[Maybe, ...], scale: float) -> KernelOperands:
    """A call with the tensors as the kernels read them."""
    return (
        rescale(call, inputs, cotangents, scale)
        if call.precision == "tf32"
        else KernelOperands(call, inputs, cotangents)
    )


def _pipelines(call: Call, jvp: bool) -> Families:
    """The tile of each family that serves the head dim, with or without tangents."""
    return schedule.pipelines(call.device, call.precision, call.width)["tangents" if jvp else "plain"]


def _described(call: Call, rows: int, *tensors: Maybe) -> tuple[Any, ...]:
    """Two descriptors of each tensor, for the column chunks; None for those that there are not."""
    _, *widths = call.k_columns
    found: list[Any] = []
    for x in tensors:
        chunks = [] if x is None else rows_descriptors(x, rows, widths)
        found += (*chunks, None, None)[:2]
    return tuple(found)


def _written(given: KernelOperands, *tensors: Maybe) -> tuple[Any, ...]:
    """The same of results. A tile in shared memory has room for half the columns of float32 ones: `ring.write`."""
    if given.factors is None:
        return _described(given.call, HALF, *tensors)
    _, *widths = given.call.k_columns
    found: list[Any] = []
    for x in tensors:
        chunks = [] if x is None else rows_descriptors(x, HALF, [columns // 2 for columns in widths])
        found += (*chunks, None, None)[:2]
    return tuple(found)
