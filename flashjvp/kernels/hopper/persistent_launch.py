"""Launches of the persistent kernels (persistent.py): which calls take them, and in how many programs."""

from typing import Any

from ... import environment
from ..launch import schedule
from ..launch.call import Call
from ..launch.hopper_tables import Persistent
from .persistent_kernels import (
    persistent_forward_kernel,
    persistent_key_kernel,
    persistent_pairs_kernel,
    persistent_query_kernel,
    persistent_value_kernel,
)

CONSUMER_ROWS = 64
KERNELS = {
    "forward": persistent_forward_kernel,
    "backward_query": persistent_query_kernel,
    "backward_key": persistent_key_kernel,
    "backward_pairs": persistent_pairs_kernel,
    "backward_value": persistent_value_kernel,
}
OF_QUERIES = ("forward", "backward_query")


def persistent_of(call: Call, jvp: bool, family: str) -> Persistent | None:
    """How a persistent kernel serves this family of a call; None where it does not.

    Items stream few rows, of half types, without a mask, not causal: causal items are of unequal length.
    """
    # mutate: if call
    if call.precision != "half" or call.mask is not None or call.pattern is not None or call.is_causal:
        return None
    sizes = call.sizes
    streamed = sizes.keys if family in OF_QUERIES else sizes.queries * sizes.group
    return schedule.persistent(call.width, "tangents" if jvp else "plain", family, streamed)


def launch_persistent(
    call: Call, family: str, chosen: Persistent, args: tuple[Any, ...], scale: float, launch_pdl: bool = False,
    **flags: Any,
) -> None:  # fmt: skip
    """One program for each multiprocessor, or fewer: each has work."""
    shared_out = call.query_programs if family in OF_QUERIES else call.key_programs
    work = shared_out(CONSUMER_ROWS if chosen.halves else 2 * CONSUMER_ROWS)
    programs = min(environment.multiprocessors(call.device), work)
    flags |= {"STAGES": chosen.pipeline.stages, "BUFFERS": chosen.resident_buffers, "HALVES": chosen.halves}
    call.launch(KERNELS[family], family, programs, args, scale, launch_pdl=launch_pdl, **flags)
