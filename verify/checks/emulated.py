"""Checks that run on the CPU what otherwise only a GPU does: warp-specialised kernels, and capture and replay.

Each takes the inputs of a call and a subject (the backend that is judged), and returns an Identity for each quantity
that it compares.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..budget.arithmetic import to_11_bits
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..emulator.compiled import compiling
from ..emulator.gluon import emulated
from ..emulator.machine import EmulationError
from ..oracles.attention import Results, Subject, dense_same_type
from ..oracles.identities import Check
from .against_float64 import against_float64
from .finite_masks import finite_masks
from .high import more_precise
from .packed import packed
from .partial import block_masks, windows
from .repeated import repeated

PATIENCE_SECONDS = 5.0  # a wait is for a few products of one tile


class RoundedProducts(TorchDispatchMode):
    """float32 products as a GPU computes them where TF32 is allowed, but for the order of their sums."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}.get(func._schema.name)
        if factors is not None and args[-1].dtype == torch.float32:
            args = (*args[:factors], *map(to_11_bits, args[factors:]))
        return func(*args, **(kwargs or {}))


@contextmanager
def tf32() -> Iterator[None]:
    """In this block float32 products are rounded on the CPU as on a GPU that uses TF32, and kernels may do so, too."""
    from flashjvp.kernels.launch import schedule

    def kind(dtype: torch.dtype, device: torch.device) -> str:
        return "tf32" if dtype == torch.float32 else "half"

    with (
        patch.object(schedule, "input_precision", kind),
        patch("verify.budget.propagation.are_factors_rounded", lambda inputs: inputs.q.dtype == torch.float32),
    ):
        yield


def dense_tf32(inputs: Inputs) -> Results:
    """PyTorch's dense attention with rounded products."""
    with RoundedProducts():
        return dense_same_type(inputs)


def in_order(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The warp-specialised kernels against dense attention, without dq_accum (sums in global memory, in any order)."""
    return _emulated(against_float64, inputs, subject, ordered=True)


def as_bfloat16(inputs: Inputs, subject: Subject) -> list[Identity]:
    """`in_order`, as for bfloat16: scores are scaled before the maximum is taken off, with a lazy rescale threshold."""

    def scaled_first(inputs: Inputs, subject: Subject) -> list[Identity]:
        from flashjvp.kernels.hopper import forward

        with patch.object(forward, "_subtracts_first", lambda dtype: False):
            return against_float64(inputs, subject)

    return _emulated(scaled_first, inputs, subject, ordered=True)


def in_any_order(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The warp-specialised kernels against dense attention, with dq_accum wherever a kernel has it."""
    return _emulated(against_float64, inputs, subject, ordered=False)


def scaled(inputs: Inputs, subject: Subject) -> list[Identity]:
    """`in_any_order` for float32 tensors in TF32, which the kernels read as float16 with per-tensor scaling."""
    with tf32():
        return _emulated(partial(against_float64, dense=dense_tf32), inputs, subject, ordered=False)


def scaled_in_order(inputs: Inputs, subject: Subject) -> list[Identity]:
    """`scaled` without dq_accum."""
    with tf32():
        return _emulated(partial(against_float64, dense=dense_tf32), inputs, subject, ordered=True)


def with_finite_masks(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The warp-specialised kernels with additive masks of finite numbers, in sums in any order."""
    return _emulated(finite_masks, inputs, subject, ordered=False)


def high(inputs: Inputs, subject: Subject) -> list[Identity]:
    """`more_precise` of half tensors, which the kernels read as float16 with per-tensor scaling."""
    from flashjvp.kernels.launch import schedule

    with patch.object(schedule, "high_precision", lambda device: "tf32"):
        return _emulated(more_precise, inputs, subject, ordered=False)


def listed(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Block masks on warp-specialised kernels, without dq_accum and with it."""
    return _in_both_orders(block_masks, inputs, subject)


def within_windows(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Windows, likewise."""
    return _in_both_orders(windows, inputs, subject)


def of_sequences(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Packed sequences, whose kernels never have dq_accum."""
    return _emulated(packed, inputs, subject, ordered=True)


def _in_both_orders(check: Check, inputs: Inputs, subject: Subject) -> list[Identity]:
    found = []
    for ordered in (True, False):
        identities = _emulated(check, inputs, subject, ordered=ordered)
        found += [replace(x, quantity=f"{x.quantity}{'' if ordered else ', dq_accum'}") for x in identities]
    return found


def persistent(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Persistent kernels against dense attention, in three programs."""
    from flashjvp import environment
    from flashjvp.kernels.launch import hopper_tables

    with patch.object(environment, "multiprocessors", lambda device: 3):
        return _emulated(against_float64, inputs, subject, ordered=True, persistent=hopper_tables.PERSISTENT)


def paired(inputs: Inputs, subject: Subject) -> list[Identity]:
    """`in_order`, with queries in pairs at a head dim of 64."""
    return _emulated(against_float64, inputs, subject, ordered=True, in_pairs=True)


def replayed(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Replayed calls give what the first calls, which were captured, gave."""

    def of_replays(inputs: Inputs, subject: Subject) -> list[Identity]:
        with compiling() as replays:
            found = repeated(inputs, subject)
        assert replays, "expected calls that are replayed, got none"
        return found

    return _emulated(of_replays, inputs, subject, ordered=True, with_launches=False)


def _emulated(
    check: Check, inputs: Inputs, subject: Subject, ordered: bool, with_launches: bool = True,
    persistent: dict[tuple[int, str], Any] | None = None, in_pairs: bool = False,
) -> list[Identity]:  # fmt: skip
    """What a check finds in the emulator. It fails for a kernel that deadlocks or does what would end a GPU's run."""
    with emulated(), _pipelines(ordered, persistent, in_pairs) as launched:
        try:
            found = check(inputs, subject)
        except EmulationError as error:
            return [Identity(str(error), None, None, False)]
    assert launched or not with_launches, "expected warp-specialised kernels to serve the call"
    return found


@contextmanager
def _pipelines(
    ordered: bool, persistent: dict[tuple[int, str], Any] | None, in_pairs: bool
) -> Iterator[list[str]]:  # fmt: skip
    """Warp-specialised kernels on CPU tensors, from the first row on, and these persistent ones. Yields the families
    that are launched."""
    from flashjvp.kernels.launch import hopper_tables, replaced

    launched: list[str] = []

    def noted(launch: Callable[..., None], call: Any, kernel: Any, family: str, *rest: Any, **constants: Any) -> None:
        launched.extend([family] if "STAGES" in constants else [])
        launch(call, kernel, family, *rest, **constants)

    was_ordered = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(ordered, warn_only=True)
    try:
        with (
            replaced.pipelines(
                hopper_tables.PIPELINES["sm_90"], dq_accum_from={}, persistent=persistent, in_pairs=in_pairs
            ),
            replaced.launch(noted),
            patch("verify.emulator.machine.PATIENCE_SECONDS", PATIENCE_SECONDS),
        ):
            yield launched
    finally:
        torch.use_deterministic_algorithms(was_ordered, warn_only=True)


EMULATED: dict[str, Check] = {
    "emulated": in_order,
    "emulated-bfloat16": as_bfloat16,
    "emulated-dq-accum": in_any_order,
    "per-tensor-scaling": scaled,
    "per-tensor-scaling-in-order": scaled_in_order,
    "emulated-finite-masks": with_finite_masks,
    "high-scaling": high,
    "emulated-block-masks": listed,
    "emulated-persistent": persistent,
    "emulated-pairs": paired,
    "emulated-windows": within_windows,
    "emulated-packed": of_sequences,
    "replayed": replayed,
}
