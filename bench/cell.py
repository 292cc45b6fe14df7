"""One cell of a sweep: the gate, then host time, peak memory and latency of a provider on a case."""

import dataclasses
import gc
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import gate, measure
from .cases import Case, make_inputs, reduced, require_gradients
from .providers import PROVIDERS, Attention

Outcome = dict[str, Any]

TINY_LENGTH = 16  # on a CPU a call does its work before it returns: few queries and keys leave the overhead


class Cells:
    """Measures cells in one process; what cells of a provider have in common is found once.

    What is beyond the error budget is timed, too, but its row is `wrong`, which no ratio or figure counts.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._loaded: tuple[str, Case, Attention] | None = None
        self._verdicts: dict[tuple[str, Case], gate.Verdict] = {}
        self._host_us: dict[tuple[str, Case], float] = {}

    def outcome(self, name: str, case: Case, repeat_s: float | None = None) -> Outcome:
        """The measured columns of a row, `status` and `reason`. repeat_s: as of measure.latency."""
        return self._survived(partial(self._measure, repeat_s=repeat_s), name, case)

    def compiled(self, name: str, case: Case) -> Outcome:
        """Calls a provider once, for what it compiles and leaves in caches on the disk; `status` and `reason`."""
        return self._survived(self._call, name, case)

    def _survived(self, do: Callable[[str, Case, Outcome], None], name: str, case: Case) -> Outcome:
        """What `do` found, `status` and `reason`, whatever it raised."""
        outcome: Outcome = {}
        try:
            do(name, case, outcome)
        except Exception as error:
            outcome["status"], outcome["reason"] = classify(error)
        gc.collect()
        if self._device.type == "cuda" and outcome["status"] != "crashed":
            self._clean_up(outcome)
        return outcome

    def _call(self, name: str, case: Case, outcome: Outcome) -> None:
        self._work(self._attention(name, case), case)()
        outcome |= {"status": "ok", "reason": ""}

    def _measure(self, name: str, case: Case, outcome: Outcome, repeat_s: float | None) -> None:
        attention = self._attention(name, case)
        verdict = self._verdict(name, case, attention)
        outcome |= {"err_o": verdict.err_o, "err_o_t": verdict.err_o_t, "err_grad": verdict.err_grad}
        outcome["host_us"] = self._host(name, case, attention)
        work = self._work(attention, case)
        if self._device.type == "cuda":
            work()  # compiles, and fills the library workspaces that are not the call's own memory
        outcome["peak_mib"] = measure.peak_mib(work, self._device)
        timed = measure.latency(work, self._device, repeat_s)
        outcome |= {"latency_p20_ms": timed.p20_ms, "latency_p50_ms": timed.p50_ms, "latency_p80_ms": timed.p80_ms}
        outcome |= {"repeats": timed.repeats, "status": "wrong" if verdict.reason else "ok", "reason": verdict.reason}

    def _clean_up(self, outcome: Outcome) -> None:
        """Gives memory back, so that the next cell finds what this one found, and sees whether the context lives."""
        try:
            torch.cuda.empty_cache()
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            outcome["status"], outcome["reason"] = "crashed", classify(error)[1]

    def _attention(self, name: str, case: Case) -> Attention:
        if self._loaded is None or self._loaded[:2] != (name, case.shape):
            self._loaded = None
            self._loaded = (name, case.shape, PROVIDERS[name].load())
        return self._loaded[2]

    def _verdict(self, name: str, case: Case, attention: Attention) -> gate.Verdict:
        longest = PROVIDERS[name].gate_length(case, self._device.type)
        key = (name, reduced(case, longest) if not case.backward else gate.gated(case, longest))
        if key not in self._verdicts:
            self._verdicts[key] = gate.check(attention, case, self._device, longest)
        return self._verdicts[key]

    def _host(self, name: str, case: Case, attention: Attention) -> float:
        tiny = reduced(case)  # the gate's shape, which is compiled already
        if self._device.type == "cpu":
            queries, keys = min(TINY_LENGTH, case.queries), min(TINY_LENGTH, case.keys)
            tiny = dataclasses.replace(tiny, batch=1, queries=queries, keys=keys)
        key = (name, tiny)
        if key not in self._host_us:
            self._host_us[key] = measure.host_us(self._work(attention, tiny), self._device)
        return self._host_us[key]

    def _work(self, attention: Attention, case: Case) -> measure.Work:
        inputs = make_inputs(case, self._device)
        if case.backward:
            require_gradients(inputs)
        return measure.work(attention, inputs, case.mode)


def classify(error: Exception) -> tuple[str, str]:
    """The status of a row whose provider raised, and the reason in one line."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if asked := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", reason):
        return "oom", f"cannot allocate {int(asked[1]) / 2**20:.0f} MiB more"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom", reason
    if isinstance(error, NotImplementedError | ImportError) or "No available kernel" in reason:
        return "unsupported", reason
    if isinstance(error, torch.AcceleratorError) or "Error [CUDA]: an illegal" in reason:
        return "crashed", reason  # such as an illegal memory access, of Triton too: the CUDA context is lost
    return "error", reason
