"""Lets tests, verify and bench watch or replace kernel launches, and give other tiles to the warp-specialised kernels.

They patch nothing else of launch/ (tests/test_seams.py). For another machine there is flashjvp/environment.py. Captured
calls are forgotten at both ends of a block, because a replay would not ask for tiles again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ... import environment
from . import hopper_tables, replay, schedule
from .call import Call
from .hopper_tables import Families, Persistent


@contextmanager
def launch(do: Callable[..., None]) -> Iterator[None]:
    """In this block each `call.launch(kernel, ...)` is `do(original, call, kernel, ...)`.

    `original(call, kernel, ...)` launches.
    """
    original: Callable[..., None] = Call.launch

    def instead(*call: Any, **constants: Any) -> None:
        do(original, *call, **constants)

    with _instead(Call, launch=instead):
        yield


@contextmanager
def bands_as_measured() -> Iterator[None]:
    """In this block windows and packed sequences count as measured with the Triton that there is."""
    with _instead(hopper_tables, MEASURED_BANDS=(environment.triton_release(),)):
        yield


@contextmanager
def pipelines(
    tiles: dict[int, dict[str, Families]], dq_accum_from: dict[int, int] | None = None,
    persistent: dict[tuple[int, str], tuple[Persistent, ...]] | None = None, in_pairs: bool = False,
) -> Iterator[None]:  # fmt: skip
    """In this block these tiles, by padded head dim, serve every device and Triton, and there are no others.

    `dq_accum_from` takes the place of the tables DQ_ACCUM_FROM and ONE_PASS_DQ_ACCUM_BELOW; {} accumulates query
    gradients from one row on. There are no persistent kernels but those of `persistent`. Queries come `in_pairs` at a
    head dim of 64 or not. Bands, the backward in one pass and narrow values count as measured.
    """
    here = (environment.triton_release(),)
    of_tables: dict[str, Any] = {
        "MEASURED_ONE_PASS": dict.fromkeys(tiles, here),
        "MEASURED_PAIRS": {64: here} if in_pairs else {},
        "MEASURED_NARROW_VALUES": here,
    }
    if dq_accum_from is not None:
        of_tables |= {"DQ_ACCUM_FROM": dq_accum_from, "ONE_PASS_DQ_ACCUM_BELOW": {}}
    of_schedule = {
        "pipelines": lambda device, precision, width: tiles.get(width, {}),
        "has_pipelines": lambda device, precision, width: width in tiles,
        "persistent": lambda *of: _persistent(persistent or {}, *of),
        "why_not_pipelines": lambda device, precision, width: None if width in tiles else "no tiles are in use",
    }
    with _instead(schedule, **of_schedule), _instead(hopper_tables, **of_tables), bands_as_measured():
        yield


def _persistent(
    table: dict[tuple[int, str], tuple[Persistent, ...]], width: int, family: str, streamed: int
) -> Persistent | None:
    return next((kernel for kernel in table.get((width, family), ()) if streamed <= kernel.up_to), None)


@contextmanager
def _instead(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    replay.forget()
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
        replay.forget()
