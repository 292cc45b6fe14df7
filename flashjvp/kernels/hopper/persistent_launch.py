"""Launches of the persistent kernels (persistent.py): which calls take them, and in how many programs."""

from typing import Any

from ... import environment
from ...backends.patterns import Band
from ..launch import schedule
from ..launch.call import Call
from ..launch.hopper_tables import Persistent
from .band_persistent import band_persistent_forward_kernel
from .persistent_kernels import persistent_forward_kernel, persistent_key_kernel, persistent_query_kernel

CONSUMER_ROWS = 64
KERNELS = {
    "forward": persistent_forward_kernel,
    "backward_query": persistent_query_kernel,
    "backward_key": persistent_key_kernel,
    "partial_forward": band_persistent_forward_kernel,
}


def persistent_of(call: Call, jvp: bool, family: str, are_scaled: bool) -> Persistent | None:
    """How a persistent kernel serves this family of a call; None where it does not.

    They are for tensors of half types, which are not those that float32 ones are scaled to, with tangents, without a
    mask, not causal: causal items are of unequal length. Items of a window that is bounded on both sides are not.
    """
    # mutate: if call
    if not jvp or are_scaled or call.mask is not None or call.is_causal:
        return None
    if call.pattern is not None and not _is_narrow(call):
        return None
    streamed = call.sizes.queries * call.sizes.group if family == "backward_key" else call.sizes.keys
    return schedule.persistent(call.width, call.family(family), streamed)


def _is_narrow(call: Call) -> bool:
    """Whether all queries see about as many keys, but for those at both ends."""
    band = call.pattern
    return isinstance(band, Band) and 2 * (band.high - band.low) < min(call.sizes.queries, call.sizes.keys)


def launch_persistent(
    call: Call, family: str, chosen: Persistent, args: tuple[Any, ...], scale: float, launch_pdl: bool = False
) -> None:
    """One program for each multiprocessor, or fewer: each has work."""
    shared_out = call.key_programs if family == "backward_key" else call.query_programs
    work = shared_out(CONSUMER_ROWS if chosen.halves else 2 * CONSUMER_ROWS)
    programs = min(environment.multiprocessors(call.device), work)
    tile = chosen.pipeline
    flags: dict[str, Any] = {
        "STAGES": tile.stages, "REGISTER_OPERANDS": tile.register_operands, "BUFFERS": chosen.resident_buffers,
        "HALVES": chosen.halves,
    }  # fmt: skip
    kernel = KERNELS[call.family(family)]
    call.launch(kernel, call.family(family), programs, args, scale, launch_pdl=launch_pdl, **flags)
