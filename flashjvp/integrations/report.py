"""What a context of `replaced` intercepted, how often, what served it and why, and what it did not reach."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .. import _torch
from ..backends import select
from .callers import Callers

MOST_CALLS = 4096  # that are kept one by one, before they are counted


@dataclass(frozen=True)
class Row:
    """Calls of one function that were served alike.

    function: what the model called.
    served_by: "flashjvp", "dense equations", "PyTorch" (its own function), or "refused".
    why: the backend of flashjvp, or the reason.
    calls: how many; of compiled code, how often it was traced.
    """

    function: str
    served_by: str
    why: str
    calls: int


@dataclass(frozen=True)
class Report:
    """What a context did; `str()` is for a reader, `as_dict()` for a program.

    rows: the calls that were intercepted.
    switched_on: names of the model's modules whose `fused_attn` was off.
    reached: names of the model's modules that look like attention, from which a call came.
    untouched: those from which no call was seen: they compute attention by themselves, were compiled, or were not
        called. Where many calls showed no new module, only some of the later ones are looked at: a module that makes
        its first calls then may be among these for the next hundred calls or so.
    """

    rows: tuple[Row, ...]
    switched_on: tuple[str, ...]
    reached: tuple[str, ...]
    untouched: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same in lists, dicts, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        lines = ["flashjvp.replaced:"]
        lines += [f"  {row.calls:6} x {row.function}: {row.served_by} ({row.why})" for row in self.rows]
        lines += ["  no call was intercepted"] * (not self.rows)
        lines += _listed("fused_attn was off, and is on in the context", self.switched_on)
        lines += _listed("no call came from (own equations, compiled, or not called)", self.untouched)
        return "\n".join(lines)


def _listed(what: str, names: tuple[str, ...]) -> Iterator[str]:
    if names:
        yield f"  {what}:"
        yield from (f"    {name}" for name in names)


class Recorder:
    """Counts calls while a context is entered."""

    def __init__(self, model: nn.Module | None) -> None:
        # Calls in the order in which threads make them. They are counted later: a dict would cost each call 1 us more.
        self.calls: list[tuple[str, Any, Any]] = []
        self._counts: Counter[tuple[str, Any, Any]] = Counter()
        self._counting = Lock()
        self._callers = Callers(model)
        self._look_at: float = 1 if self._callers.unreached else math.inf  # a length of `calls`
        self.stop_at = min(self._look_at, MOST_CALLS)  # the length at which to look or to count
        self._all_names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        self._switched_on: dict[str, None] = {}

    def add(self, function: str, served_by: str, why: str) -> None:
        """One call, that something else than flashjvp's attention served."""
        if is_dynamo_compiling():
            _note_compiled(function, served_by, why)
        else:
            self._add((function, served_by, why))

    def add_attention(self, function: str, q: Tensor, served_by: str = "", why: str = "") -> None:
        """One call of attention; of flashjvp's, on the backend for these queries, where nothing else served it."""
        if is_dynamo_compiling():
            _note_compiled(function, served_by or "flashjvp", why)
            return
        self._add((function, served_by or q.device, why or q.dtype))
        if len(self.calls) >= self.stop_at:
            self.look_and_count()

    def look_and_count(self) -> None:
        """What is due after the call of attention that was added to `calls`."""
        calls = len(self.calls)
        if calls >= self._look_at:
            self._look_at = calls + self._callers.look()
        if calls >= MOST_CALLS:
            self._count()
        self.stop_at = min(self._look_at, MOST_CALLS)

    def add_compiled(self, function: str, served_by: str, why: str) -> None:
        """One trace of torch.compile."""
        self._add((function, served_by, why))

    def note_switches(self, modules: list[nn.Module]) -> None:
        """Modules that were switched on."""
        for module in modules:
            self._switched_on[self._all_names.get(id(module), type(module).__name__)] = None

    def report(self) -> Report:
        """What was counted up to now."""
        self._count()
        merged: Counter[tuple[str, str, str]] = Counter()
        for (function, second, third), calls in self._counts.items():
            if isinstance(second, torch.device):
                merged[function, "flashjvp", f"{select.choose(second, third)}, {third} on {second}"] += calls
            else:
                merged[function, second, third] += calls
        rows = tuple(Row(name, by, why, calls) for (name, by, why), calls in merged.items())
        untouched = tuple(self._callers.unreached.values())
        reached = sorted(set(self._callers.names.values()) - set(untouched))
        return Report(rows, tuple(self._switched_on), tuple(reached), untouched)

    def _add(self, call: tuple[str, Any, Any]) -> None:
        self.calls.append(call)
        if len(self.calls) > 2 * MOST_CALLS:
            self._count()

    def _count(self) -> None:
        """Threads may append meanwhile: what is counted is taken from the front, at once."""
        with self._counting:
            counted = self.calls[:]
            self._counts.update(counted)
            del self.calls[: len(counted)]
            self._look_at -= len(counted)
            self.stop_at = min(self._look_at, MOST_CALLS)


@_torch.once_a_trace
def _note_compiled(function: str, served_by: str, why: str) -> None:
    """In the report of the context that is compiled."""
    from .active import present

    context = present()
    if context is not None:
        context.report_of.add_compiled(function, served_by, f"{why + '; ' if why else ''}traced by torch.compile")
