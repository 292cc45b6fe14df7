"""Checks that run on the CPU what otherwise only a GPU does: the warp-specialised kernels, and repeated launches.

Each takes the inputs of a call and a subject and returns an Identity for each quantity, as in properties.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from . import tolerance
from .cases import Inputs
from .compiled import compiling
from .hopper_emulator import EmulationError, emulated
from .oracles import Subject, dense64, dense_same_type
from .properties import Property
from .tolerance import Identity
from .wiring import repeated

PATIENCE_SECONDS = 5.0  # a wait is for a few products of one tile


def against_float64(inputs: Inputs, subject: Subject) -> list[Identity]:
    """All results against dense attention: whole tensors, then their worst rows."""
    exact = dense64(inputs)
    budgets = tolerance.budget(inputs, exact, dense_same_type(inputs))
    return [
        Identity(row.tensor, error, budget, row.ok)
        for row in tolerance.check(subject.results(inputs), exact, budgets)
        for error, budget in ((row.frobenius, row.frobenius_budget), (row.worst_row, row.worst_row_budget))
    ]


def in_order(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The warp-specialised kernels against dense attention, query gradients without sums in global memory."""
    return _emulated(against_float64, inputs, subject, ordered=True)


def in_any_order(inputs: Inputs, subject: Subject) -> list[Identity]:
    """The same, with those sums where there is a kernel for them."""
    return _emulated(against_float64, inputs, subject, ordered=False)


def played(inputs: Inputs, subject: Subject) -> list[Identity]:
    """Calls played from recordings give what the first calls gave."""

    def played_ones(inputs: Inputs, subject: Subject) -> list[Identity]:
        with compiling() as plays:
            found = repeated(inputs, subject)
        assert plays, "expected calls that are played from recordings, got none"
        return found

    return _emulated(played_ones, inputs, subject, ordered=True)


def _emulated(check: Property, inputs: Inputs, subject: Subject, ordered: bool) -> list[Identity]:
    """What a check finds in the emulator. A kernel that does what a GPU would not survive fails it."""
    with emulated(), _pipelines(ordered) as launched:
        try:
            found = check(inputs, subject)
        except EmulationError as error:
            return [Identity(str(error), None, None, False)]
    assert launched or check is not against_float64, "expected warp-specialised kernels to serve the call"
    return found


@contextmanager
def _pipelines(ordered: bool) -> Iterator[list[str]]:
    """Warp-specialised kernels on CPU tensors, from the first row on. Yields the families that are launched."""
    from flashjvp.kernels import pipelines, recordings, schedule
    from flashjvp.kernels.launch import Call

    launched: list[str] = []
    launch: Callable[..., None] = Call.launch_pipeline
    tables = pipelines.PIPELINES["sm_90"]

    def noted(call: Call, kernel: Any, family: str, *rest: Any, **constants: Any) -> None:
        launched.append(family)
        launch(call, kernel, family, *rest, **constants)

    was_ordered = torch.are_deterministic_algorithms_enabled()
    recordings.forget()
    torch.use_deterministic_algorithms(ordered, warn_only=True)
    try:
        with (
            patch.object(schedule, "pipelines", lambda device, kind, width: tables.get(width, {})),
            patch.object(Call, "launch_pipeline", noted),
            patch.object(pipelines, "SUMS_FROM", {}),
            patch("verify.hopper_emulator.PATIENCE_SECONDS", PATIENCE_SECONDS),
        ):
            yield launched
    finally:
        torch.use_deterministic_algorithms(was_ordered, warn_only=True)
        recordings.forget()


EMULATED: dict[str, Property] = {"emulated": in_order, "emulated-sums": in_any_order, "played": played}
