"""Launches of the persistent kernels (persistent.py): which calls take them, and in how many programs."""

from typing import Any

from ... import environment
from ..launch import schedule
from ..launch.call import Call
from ..launch.hopper_tables import Persistent
from .persistent_kernels import persistent_forward_kernel, persistent_key_kernel, persistent_query_kernel

CONSUMER_ROWS = 64
KERNELS = {
    "forward": persistent_forward_kernel,
    "backward_query": persistent_query_kernel,
    "backward_key": persistent_key_kernel,
}


def persistent_of(call: Call, jvp: bool, family: str, are_scaled: bool) -> Persistent | None:
    """How a persistent kernel serves this family of a call; None where it does not.

    They are for tensors of half types, which are not those that float32 ones are scaled to, with tangents, without a
    mask, not causal: causal items are of unequal length.
    """
    # mutate: if call
    if not jvp or are_scaled or call.mask is not None or call.pattern is not None or call.is_causal:
        return None
    streamed = call.sizes.queries * call.sizes.group if family == "backward_key" else call.sizes.keys
    return schedule.persistent(call.width, family, streamed)


def launch_persistent(
    call: Call, family: str, chosen: Persistent, args: tuple[Any, ...], scale: float, launch_pdl: bool = False,
    **flags: Any,
) -> None:  # fmt: skip
    """One program for each multiprocessor, or fewer: each has work. The kernel gets these flags, too."""
    shared_out = call.key_programs if family == "backward_key" else call.query_programs
    work = shared_out(CONSUMER_ROWS if chosen.halves else 2 * CONSUMER_ROWS)
    programs = min(environment.multiprocessors(call.device), work)
    tile = chosen.pipeline
    flags |= {
        "STAGES": tile.stages, "REGISTER_OPERANDS": tile.register_operands, "BUFFERS": chosen.resident_buffers,
        "HALVES": chosen.halves,
    }  # fmt: skip
    call.launch(KERNELS[family], family, programs, args, scale, launch_pdl=launch_pdl, **flags)
